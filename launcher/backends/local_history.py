"""What became of a local run's attempts: the supervisor's journal laid beside the trainer's records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from influence.rundir import AttemptRecord, RunPaths, classify, describe
from launcher.backends import AttemptFacts, Event, journal
from launcher.backends.attempt_records import merged, readable_records

_DECIDED = {
    "retry": "started again",
    "fail": "not started again",
    "succeed": "nothing left to do",
    "stop": "stopped",
}
# Everything of an event's line but what every line has.
_COMMON = ("at", "event")


def attempt_facts(paths: RunPaths) -> Sequence[AttemptFacts]:
    """Every attempt, the oldest first, whether the supervisor or only the trainer wrote of it.

    Raises:
        StorageError: the run directory cannot be listed.
    """
    records = readable_records(paths)
    found: list[AttemptFacts] = []
    host = ""
    pids: list[int] = []
    for event in journal.read_events(paths):
        kind = event.get("event")
        if kind == "supervisor_started":
            host = str(event.get("host", ""))
            if found and found[-1].ended_by is None:
                found[-1] = replace(found[-1], ended_by="its supervisor was killed, and it with it")
        elif kind == "attempt_started":
            pid = event.get("pid")
            found.append(AttemptFacts(where=f"process {pid} on host {host}", started_at=_at(event)))
            pids.append(pid if isinstance(pid, int) else 0)
        elif kind == "attempt_ended" and found:
            found[-1] = _ended(found[-1], event)
        elif kind == "decided" and found:
            found[-1] = replace(found[-1], decision=_decision(event))
    numbered = [
        replace(facts, number=_number(facts, pid, records)) for facts, pid in zip(found, pids, strict=True)
    ]
    return merged(numbered, records)


def events(paths: RunPaths) -> Sequence[Event]:
    """The supervisor's journal, in the words of every backend."""
    return [
        Event(
            at=_at(event) or "",
            about=f"attempt {event['attempt']}" if event.get("attempt") else "supervisor",
            reason="".join(word.capitalize() for word in str(event.get("event", "")).split("_")),
            message=", ".join(
                f"{key.replace('_', ' ')} {value}"
                for key, value in sorted(event.items())
                if key not in _COMMON and value is not None
            ),
            warning=_is_warning(event),
        )
        for event in journal.read_events(paths)
    ]


def _is_warning(event: Mapping[str, Any]) -> bool:
    if event.get("event") == "attempt_ended":
        return event.get("exit_code") != 0
    return event.get("event") == "survivors" or event.get("outcome") == "failed"


def _ended(facts: AttemptFacts, event: Mapping[str, Any]) -> AttemptFacts:
    code, number = event.get("exit_code"), event.get("attempt")
    if not isinstance(code, int) or not -64 <= code <= 255:
        return replace(facts, ended_at=_at(event))
    return replace(
        facts,
        ended_at=_at(event),
        exit_code=code,
        ended_by=describe(code),
        verdict=classify(code),
        number=number if isinstance(number, int) else None,
    )


def _decision(event: Mapping[str, Any]) -> str:
    decision, reason = str(event.get("decision")), str(event.get("reason", ""))
    words = _DECIDED.get(decision, decision)
    wait_s = event.get("wait_s")
    if decision == "retry" and isinstance(wait_s, (int, float)):
        words += f" after {wait_s:g} s"
    if decision != "succeed":
        words += ", charged" if event.get("charged") is True else ", not charged"
    # What ended the attempt stands before the last "; ", and is told by itself.
    return f"{words}: {reason if decision == 'succeed' else reason.rpartition('; ')[2]}"


def _number(facts: AttemptFacts, pid: int, records: Mapping[int, AttemptRecord]) -> int | None:
    """The number that the process claimed; None where it claimed none."""
    if facts.number is not None:
        return facts.number
    own = (
        number
        for number, record in records.items()
        if record.pid == pid and facts.where.endswith(f" on host {record.host}")
    )
    return max(own, default=None)


def _at(event: Mapping[str, Any]) -> str | None:
    at = event.get("at")
    return at if isinstance(at, str) else None
