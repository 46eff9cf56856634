"""Commit records: what makes an NPZ file a step of the run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from influence.rundir.fields import Fields, plain_numbers
from influence.rundir.files import read_json
from influence.rundir.paths import RunPaths
from influence.rundir.segments import Segment, read_segments
from influence.rundir.spec import SCHEMA_VERSION

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """The content of ``steps/step_000001.json``, or of its like under ``replays/``."""

    step: int
    file: str
    """The NPZ file's plain name; `CommitRecord.npz` says in which directory."""
    bytes: int
    """The NPZ file's size."""
    sha256: str
    """Hexadecimal digits, of the NPZ file."""
    rows: int
    """Responses."""
    positions: int
    """Scores, over all rows."""
    nan_count: int
    """Scores that are NaN: tokens that were meant to be captured and were not."""
    spec_hash: str
    attempt: int
    """Who computed it."""
    resumed_from: int
    """The checkpoint's step that the attempt started from; 0: from scratch."""
    lineage: tuple[Segment, ...]
    """Who computed the steps 1 to ``step`` that this one grew from; the last segment ends at ``step``."""
    replay: bool = False
    """The step was committed before, by a lower attempt."""
    equal: bool = False
    """A replay whose NPZ has the bytes of the first commit's, which then serves for both."""
    committed_at: str
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds a phase."""
    metrics: dict[str, float] = field(default_factory=dict)

    def npz(self, paths: RunPaths) -> Path:
        """Where the step's NPZ file lies."""
        if self.replay and not self.equal:
            return paths.replay_npz(self.attempt, self.step)
        return paths.step_npz(self.step)

    def path(self, paths: RunPaths) -> Path:
        """Where the record itself lies."""
        if self.replay:
            return paths.replay_record(self.attempt, self.step)
        return paths.step_record(self.step)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "step": self.step,
            "file": self.file,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "rows": self.rows,
            "positions": self.positions,
            "nan_count": self.nan_count,
            "spec_hash": self.spec_hash,
            "attempt": self.attempt,
            "resumed_from": self.resumed_from,
            "lineage": [list(segment) for segment in self.lineage],
            "replay": self.replay,
            "equal": self.equal,
            "committed_at": self.committed_at,
            "timings": plain_numbers(self.timings),
            "metrics": plain_numbers(self.metrics),
        }

    @classmethod
    def from_dict(cls, document: Any, path: Path) -> CommitRecord:
        """Check a document; ``path`` is for the messages.

        Raises:
            SchemaVersionError: another version wrote it.
            CorruptError: a field is missing, wrong, or at odds with another one.
        """
        fields = Fields(document, path)
        fields.schema_version(SCHEMA_VERSION)
        step = fields.integer("step", minimum=1)
        positions = fields.integer("positions")
        record = cls(
            step=step,
            file=fields.text("file"),
            bytes=fields.integer("bytes", minimum=1),
            sha256=fields.text("sha256"),
            rows=fields.integer("rows"),
            positions=positions,
            nan_count=fields.integer("nan_count", maximum=positions),
            spec_hash=fields.text("spec_hash"),
            attempt=fields.integer("attempt", minimum=1),
            resumed_from=fields.integer("resumed_from", maximum=step - 1),
            lineage=read_segments(fields, "lineage"),
            replay=fields.boolean("replay"),
            equal=fields.boolean("equal"),
            committed_at=fields.time("committed_at"),
            timings=fields.numbers("timings"),
            metrics=fields.numbers("metrics"),
        )
        # The file's name follows from the step: no other one, and so no path, can get in here.
        if record.file != RunPaths(Path()).step_npz(step).name:
            raise fields.error(
                f"file is {ascii(record.file)[:80]}, which is not the name of step {step}'s NPZ"
            )
        if not _SHA256.fullmatch(record.sha256):
            raise fields.error(f"sha256 is {ascii(record.sha256)[:80]}, not 64 hexadecimal digits")
        if record.lineage[-1:] != (Segment(record.attempt, record.resumed_from + 1, step),):
            raise fields.error(f"lineage does not end with attempt {record.attempt}'s steps up to {step}")
        if record.equal and not record.replay:
            raise fields.error("equal is true, but it is no replay")
        return record


def read_record(paths: RunPaths, step: int, replay_of: int | None = None) -> CommitRecord:
    """The record of a step's first commit, or of its replay by attempt ``replay_of``.

    Raises:
        FileNotFoundError: there is none.
        SchemaVersionError, CorruptError: as `CommitRecord.from_dict`, also where it lies in another step's
        place. StorageError: it cannot be read.
    """
    path = paths.step_record(step) if replay_of is None else paths.replay_record(replay_of, step)
    record = CommitRecord.from_dict(read_json(path, root_dir=paths.root_dir), path)
    fields = Fields({}, path)
    if record.step != step:
        raise fields.error(f"is the record of step {record.step}")
    if record.replay != (replay_of is not None) or (replay_of is not None and record.attempt != replay_of):
        raise fields.error(f"is a record of attempt {record.attempt} that lies in another one's place")
    return record
