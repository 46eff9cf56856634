"""Attempts: each start of the trainer claims a number, says where it resumed, and says how it ended."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from influence.rundir.clock import utc_now
from influence.rundir.errors import CorruptError, FencedError
from influence.rundir.fields import Fields
from influence.rundir.files import make_dir, read_json, remove_temporaries, write_json
from influence.rundir.lineage import resume_segments
from influence.rundir.paths import RunPaths, attempt_label
from influence.rundir.segments import Segment, read_segments
from influence.rundir.spec import SCHEMA_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """The content of ``attempts/0001.json``."""

    number: int
    host: str
    pid: int
    node: str | None = None
    pod: str | None = None
    started_at: str
    ended_at: str | None = None
    """None while it runs, and for ever if it died too hard to say."""
    exit_code: int | None = None
    """0..255, or ``-signal``."""
    reason: str | None = None
    resumed_from: int = 0
    """The checkpoint's step; 0: from scratch."""
    segments: tuple[Segment, ...] = field(default=())
    """The lineage: which attempts computed the steps that this attempt's weights grew from, and its own."""
    package_version: str = ""

    @property
    def is_open(self) -> bool:
        """It has not said how it ended: it runs, or it was killed."""
        return self.ended_at is None

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "number": self.number,
            "host": self.host,
            "pid": self.pid,
            "node": self.node,
            "pod": self.pod,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "exit_code": self.exit_code,
            "reason": self.reason,
            "resumed_from": self.resumed_from,
            "segments": [list(segment) for segment in self.segments],
            "package_version": self.package_version,
        }

    @classmethod
    def from_dict(cls, document: Any, path: Path, number: int) -> AttemptRecord:
        """Check the record that ``path`` holds for the attempt ``number``; raises as `list_attempts`."""
        fields = Fields(document, path)
        fields.schema_version(SCHEMA_VERSION)
        record = cls(
            number=fields.integer("number", minimum=number, maximum=number),
            host=fields.text("host"),
            pid=fields.integer("pid"),
            node=fields.text_or_none("node"),
            pod=fields.text_or_none("pod"),
            started_at=fields.time("started_at"),
            ended_at=None if fields.text_or_none("ended_at") is None else fields.time("ended_at"),
            exit_code=fields.integer_or_none("exit_code", minimum=-64, maximum=255),
            reason=fields.text_or_none("reason"),
            resumed_from=fields.integer("resumed_from"),
            segments=read_segments(fields, "segments"),
            package_version=fields.text("package_version"),
        )
        if not record.segments or record.segments[-1] != (number, record.resumed_from + 1, None):
            raise fields.error(
                f"segments do not end with attempt {number} from step {record.resumed_from + 1} on"
            )
        return record


class Attempt:
    """One attempt's own handle; the only writer of its record, from however many of its processes."""

    def __init__(self, paths: RunPaths, number: int) -> None:
        self._paths = paths
        self.number = number

    @property
    def record(self) -> AttemptRecord:
        """As it stands in the file now."""
        return read_attempt(self._paths, self.number)

    def set_resume(self, step: int, from_attempt: int | None = None) -> None:
        """Say which checkpoint this attempt's weights come from; to be called before its first commit.

        The steps up to ``step`` then have the lineage of the attempt that wrote the checkpoint.

        Args:
            step: the checkpoint's step; 0: from scratch.
            from_attempt: who wrote that checkpoint. Without it: the highest lower attempt that committed
                ``step`` itself, which is right unless an attempt died between the commit and its checkpoint.

        Raises:
            CorruptError: no lower attempt committed that step, or ``from_attempt`` did not.
        """
        segments = resume_segments(self._paths, self.number, step, from_attempt)
        self._update(resumed_from=step, segments=segments)

    def finish(self, exit_code: int, reason: str) -> None:
        """Say how the attempt ended."""
        self._update(ended_at=utc_now(), exit_code=exit_code, reason=reason)

    def fenced(self) -> bool:
        """Whether a later attempt has taken over."""
        return self._highest() > self.number

    def require_unfenced(self) -> None:
        """Raises FencedError where a later attempt has taken over."""
        highest = self._highest()
        if highest > self.number:
            raise FencedError(self._paths.attempt(highest), self.number, highest)

    def _highest(self) -> int:
        return max(self._paths.attempt_numbers(), default=0)

    def _update(self, **changes: Any) -> None:
        document = replace(self.record, **changes).to_dict()
        write_json(self._paths.attempt(self.number), document, label=attempt_label(self.number))


def claim_attempt(
    paths: RunPaths, *, reserve: Callable[[AttemptRecord], bool] | None = None, **fields: Any
) -> Attempt:
    """Claim the next attempt number, exclusively, and take over from all lower attempts.

    What they left half written is removed.

    Args:
        reserve: claims the number elsewhere first, where other machines see it; False: it is taken there.
        fields: of `AttemptRecord`, e.g. ``node``, ``pod``, ``package_version``; host, process id and time are
            this process's unless given.

    Raises:
        StorageError: the filesystem refused.
    """
    make_dir(paths.attempts_dir)
    fields = {"host": os.uname().nodename, "pid": os.getpid(), "started_at": utc_now(), **fields}
    number = 0
    while True:
        number = max(number, max(paths.attempt_numbers(), default=0)) + 1
        record = AttemptRecord(number=number, segments=(Segment(number, 1, None),), **fields)
        if reserve is not None and not reserve(record):
            continue
        try:
            write_json(paths.attempt(number), record.to_dict(), exclusive=True, label=attempt_label(number))
        except FileExistsError:
            continue  # another start was quicker
        _remove_leftovers(paths, number)
        return Attempt(paths, number)


def _remove_leftovers(paths: RunPaths, claimed: int) -> None:
    """Outputs that lower attempts did not finish; one that still lives then fails, as fenced.

    Not in ``attempts/``, where a lower attempt may write its end at this very moment.
    """
    labels = {attempt_label(number) for number in paths.attempt_numbers() if number < claimed}
    replays = [paths.replays_of(number) for number in paths.replayed_step_numbers()]
    for directory in (paths.steps_dir, *replays):
        remove_temporaries(directory, labels)


def read_attempt(paths: RunPaths, number: int) -> AttemptRecord:
    """One attempt's record; raises as `list_attempts`, and CorruptError where there is none."""
    path = paths.attempt(number)
    try:
        document = read_json(path, root_dir=paths.root_dir)
    except FileNotFoundError:
        raise CorruptError(path, "is not there", "claim an attempt before using its number") from None
    return AttemptRecord.from_dict(document, path, number)


def list_attempts(paths: RunPaths) -> list[AttemptRecord]:
    """All attempts, in increasing order.

    Raises:
        SchemaVersionError: another version wrote a record.
        CorruptError: a record is not what an attempt wrote; names the file.
        StorageError: it cannot be read.
    """
    return [read_attempt(paths, number) for number in paths.attempt_numbers()]
