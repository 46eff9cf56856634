"""What happened to a training: its pods, its events and its phases, as Run:ai keeps them.

Not seen on a live control plane: whether the pods of earlier attempts stay in the answer. Where the run
directory is readable, the trainer's own records fill the gap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any, TypeVar

from influence.rundir import (
    RunPaths,
    parse_time,
)
from launcher.backends import AttemptFacts, Event
from launcher.backends.attempt_records import merged, readable_records
from launcher.backends.runai_answers import Pod, ShapeError, mapping, pod, text, text_or_none
from launcher.backends.runai_client import RunaiClient
from launcher.backends.runai_phases import PHASES, reason_of
from launcher.backends.runai_refusals import NotThereError, one_line
from launcher.backends.runai_trainings import WORKLOADS, Generation
from launcher.states import Phase

_T = TypeVar("_T")
_ENDED = {"Succeeded": "completed", "Failed": "failed"}


def attempts_of(
    run: str, generations: Sequence[Generation], client: RunaiClient, root: Path | None
) -> list[AttemptFacts]:
    """Every attempt that Run:ai or the trainer tells of, the oldest first.

    Args:
        root: the folder of run directories; None where this machine does not see it.

    Raises:
        BackendError: Run:ai does not tell.
    """
    pods = [each for generation in generations for each in _pods(client, generation)]
    records = {} if root is None else readable_records(RunPaths.of(root, run))
    return merged([_of_pod(each) for each in pods], records)


def events_of(generations: Sequence[Generation], client: RunaiClient) -> list[Event]:
    """Events and changes of phase of all trainings of a run, the oldest first.

    Raises:
        BackendError: Run:ai does not tell.
    """
    found: dict[tuple[str, str, str, str], Event] = {}
    for generation in generations:
        for event in (*_history(client, generation), *_events(client, generation)):
            # Both listings tell the same events.
            found.setdefault((event.at, event.about, event.reason, event.message), event)
    return sorted(found.values(), key=lambda event: event.at)


def _pods(client: RunaiClient, generation: Generation) -> list[Pod]:
    return _read(client, generation, "pods", "pods", pod)


def _events(client: RunaiClient, generation: Generation) -> list[Event]:
    return _read(client, generation, "events", "events", lambda entry: _event(entry, generation))


def _history(client: RunaiClient, generation: Generation) -> list[Event]:
    return _read(client, generation, "history", "records", lambda entry: _record(entry, generation))


def _read(
    client: RunaiClient, generation: Generation, name: str, key: str, parse: Callable[[Any], _T]
) -> list[_T]:
    """What a workload's listing tells; nothing where Run:ai no longer has it."""
    path = f"{WORKLOADS}/{generation.workload.id}/{name}"
    problem = ""
    try:
        return [parse(entry) for entry in client.pages(path, key)]
    except NotThereError:
        return []
    except ShapeError as error:
        problem = str(error)
    raise client.misshapen(path, problem)


def _record(entry: Any, generation: Generation) -> Event:
    """A record of the history: an event, or a change of phase."""
    record = mapping(entry, "a record")
    meta, spec = mapping(record.get("meta"), "meta"), mapping(record.get("spec"), "spec")
    if spec.get("event") is not None:
        return _event(spec["event"], generation)
    update = mapping(spec.get("phaseUpdate"), "phaseUpdate")
    word = text(update, "phase")
    message = one_line(text_or_none(update, "phaseMessage") or "")
    return Event(
        at=_time(text(meta, "creationTimestamp")),
        about=f"Training {generation.workload.name}",
        reason=word,
        message=reason_of(word, message),
        warning=PHASES.get(word) is Phase.FAILED,
    )


def _event(entry: Any, generation: Generation) -> Event:
    event = mapping(entry, "an event")
    involved = event.get("involvedObject")
    about = f"Training {generation.workload.name}"
    if isinstance(involved, Mapping) and involved.get("name"):
        about = one_line(f"{involved.get('kind') or 'Object'} {involved['name']}")
    return Event(
        at=_time(text(event, "createdAt")),
        about=about,
        reason=one_line(text_or_none(event, "reason") or ""),
        message=one_line(text_or_none(event, "message") or ""),
        warning=event.get("type") == "Warning",
    )


def _time(written: str) -> str:
    """ISO 8601 in UTC with the same digits everywhere, so that times sort as texts."""
    try:
        at = parse_time(written)
    except ValueError:
        raise ShapeError(f"{written[:40]!a} is no time") from None
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _of_pod(each: Pod) -> AttemptFacts:
    return AttemptFacts(
        where=f"pod {each.name}" + (f" on node {each.node}" if each.node else ""),
        pod=each.name,
        started_at=each.created_at,
        ended_at=each.ended_at,
        ended_by=_ENDED.get(each.phase),
    )
