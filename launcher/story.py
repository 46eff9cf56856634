"""A run's story, for ``launcher explain``: what became of every attempt, and what its backend warns of."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

from influence.rundir import AttemptRecord, RunDirError, RunPaths
from launcher.backends import AttemptFacts, Event
from launcher.backends.attempt_records import merged, readable_records
from launcher.errors import BackendError
from launcher.lifecycle import run_status
from launcher.rundir_errors import in_words, run_dir_errors
from launcher.site import Site
from launcher.states import RunStatus

MAX_WARNINGS = 10
_TAIL_BYTES = 2**16
_STYLE = re.compile(r"\x1b\[[0-9;:]*m")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStory:
    """One attempt."""

    facts: AttemptFacts
    resumed_from: int | None
    """The checkpoint's step; 0: from scratch; None where the trainer's record is not known."""
    log_lines: tuple[str, ...]
    """The last lines that it printed."""

    def to_dict(self) -> dict[str, Any]:
        document = {field.name: getattr(self.facts, field.name) for field in fields(self.facts)}
        verdict = self.facts.verdict
        return document | {
            "verdict": None if verdict is None else verdict.value,
            "resumed_from": self.resumed_from,
            "log_lines": list(self.log_lines),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """A run with all that is known of how it came to its state."""

    status: RunStatus
    attempts: tuple[AttemptStory, ...]
    warnings: tuple[Event, ...]
    """The latest, the oldest of them first."""
    gaps: tuple[str, ...]
    """What could not be asked, in words."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "status": self.status.to_dict(),
            "attempts": [attempt.to_dict() for attempt in self.attempts],
            "warnings": [event_dict(event) for event in self.warnings],
            "gaps": list(self.gaps),
        }


def event_dict(event: Event) -> dict[str, Any]:
    """An event as JSON has it."""
    return {field.name: getattr(event, field.name) for field in fields(event)}


def tell(site: Site, run: str, *, num_lines: int) -> Story:
    """Ask everybody who knows something; who does not answer leaves a gap, and the rest is told.

    Args:
        num_lines: how many of the last lines of each attempt's log.

    Raises:
        UsageError, NotFoundError, BackendError: as ``run_status``.
    """
    status = run_status(site, run)
    gaps: list[str] = []

    def asked(what: str, ask: Callable[[], Sequence[_T]]) -> Sequence[_T]:
        try:
            return ask()
        except RunDirError as error:
            gaps.append(f"{what}: {in_words(error)}")
        except (BackendError, OSError) as error:
            why = f" ({error.why})" if isinstance(error, BackendError) and error.why else ""
            gaps.append(f"{what}: {error}{why}")
        return ()

    with run_dir_errors():
        paths = site.paths(run)
    records = {record.number: record for record in asked("the trainer's records", lambda: _records(paths))}
    told = asked("the backend's history", lambda: site.backend.history(run))
    events = asked("the backend's events", lambda: site.backend.events(run))
    logged = asked("the logs", lambda: site.backend.attempts(run)) if num_lines else ()
    attempts = []
    for facts in merged(told, records):
        lines: Sequence[str] = ()
        number = facts.number
        if number is not None and number in logged:
            last_lines = partial(_last_lines, site, paths, run, number, num_lines)
            lines = asked(f"the log of attempt {number}", last_lines)
        attempts.append(
            AttemptStory(
                facts=facts,
                resumed_from=records[number].resumed_from if number in records else None,
                log_lines=tuple(lines),
            )
        )
    warnings = [event for event in events if event.warning]
    return Story(
        status=status,
        attempts=tuple(attempts),
        warnings=tuple(warnings[-MAX_WARNINGS:]),
        gaps=tuple(gaps),
    )


def _records(paths: RunPaths | None) -> list[AttemptRecord]:
    return [] if paths is None else list(readable_records(paths).values())


def _last_lines(site: Site, paths: RunPaths | None, run: str, number: int, num_lines: int) -> list[str]:
    """The last lines of a log, without reading it from its beginning where its size can be seen."""
    offset_bytes = 0
    if paths is not None and paths.log(number).is_file():
        offset_bytes = max(0, paths.log(number).stat().st_size - _TAIL_BYTES)
    tail = b""
    while piece := site.backend.read_log(run, number, offset_bytes):
        offset_bytes += len(piece)
        tail = (tail + piece)[-_TAIL_BYTES:]
    lines = (_STYLE.sub("", line).rstrip() for line in tail.decode("utf-8", "replace").splitlines())
    return [line for line in lines if line][-num_lines:]
