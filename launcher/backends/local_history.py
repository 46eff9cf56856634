"""What became of a local run's attempts: the supervisor's journal laid beside the trainer's records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from influence.rundir import AttemptRecord, RunDirError, RunPaths, classify, describe, read_attempt
from launcher.backends import AttemptFacts, Event, journal

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
    records = _records(paths)
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
    numbered = [_with_record(facts, pid, records) for facts, pid in zip(found, pids, strict=True)]
    told = {facts.number for facts in numbered}
    untold = [_of_record(record) for number, record in records.items() if number not in told]
    return sorted([*numbered, *untold], key=lambda facts: facts.started_at or "")


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


def _records(paths: RunPaths) -> dict[int, AttemptRecord]:
    records = {}
    for number in paths.attempt_numbers():
        try:
            records[number] = read_attempt(paths, number)
        except RunDirError:  # torn by a dying disk: the journal alone tells then
            continue
    return records


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
    return f"{words}: {reason}"


def _with_record(facts: AttemptFacts, pid: int, records: Mapping[int, AttemptRecord]) -> AttemptFacts:
    """The number and the trainer's own words, where its record is known to be this process's."""
    number = facts.number
    if number is None:
        own = [
            number
            for number, record in records.items()
            if record.pid == pid and facts.where.endswith(f" on host {record.host}")
        ]
        number = max(own, default=None)
    record = None if number is None else records.get(number)
    if record is None:
        return facts
    facts = replace(facts, number=number)
    if record.reason and facts.ended_by is not None and record.reason not in facts.ended_by:
        facts = replace(facts, ended_by=f"{facts.ended_by}: {record.reason}")
    return facts


def _of_record(record: AttemptRecord) -> AttemptFacts:
    ended_by = None if record.exit_code is None else describe(record.exit_code)
    return AttemptFacts(
        where=f"process {record.pid} on host {record.host}",
        number=record.number,
        started_at=record.started_at,
        ended_at=record.ended_at,
        exit_code=record.exit_code,
        ended_by=f"{ended_by}: {record.reason}" if ended_by and record.reason else ended_by,
        verdict=None if record.exit_code is None else classify(record.exit_code),
    )


def _at(event: Mapping[str, Any]) -> str | None:
    at = event.get("at")
    return at if isinstance(at, str) else None
