"""Which commit of a step readers see, and whether its file is what was committed.

A retry can compute a step again, so a step can have several commits: the first under ``steps/``, the others
under ``replays/``. Two rules choose one a step:

``final``  the commits that the run's last step grew from: follow the lineage in the record of the highest
step
           (of several commits of that step: the highest attempt's).
``first``  whatever was committed first.

Each record carries its whole lineage, so reading depends on nothing but the records themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from influence.rundir.errors import CorruptError
from influence.rundir.files import sha256_file
from influence.rundir.paths import RunPaths
from influence.rundir.record import CommitRecord, read_record
from influence.rundir.segments import Segment
from influence.rundir.spec import read_run

Lineage = Literal["final", "first"]
Status = Literal["ok", "missing", "torn", "foreign", "corrupt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCheck:
    """What `verify_step` found."""

    status: Status
    """``missing``: no file; ``torn``: another size; ``foreign``: another run's, a link, no regular file;
    ``corrupt``: the size is right and the bytes are not."""
    reason: str
    """In words; empty where the status is ``ok``."""
    path: Path
    """The NPZ file."""


def committed_steps(
    paths: RunPaths, lineage: Lineage = "final", *, damaged: list[CorruptError] | None = None
) -> dict[int, CommitRecord]:
    """The run's steps, in increasing order, with the commit that readers see.

    Args:
        damaged: takes the errors of records that cannot be used, so that the others can still be seen;
            without it the first such record raises.

    Raises:
        NotARunError: there is no ``run.json``.
        CorruptError: a record is torn, altered, or belongs to another run (another spec hash).
        SchemaVersionError, StorageError: as reading any file of a run.
        ValueError: no such lineage.
    """
    if lineage not in ("final", "first"):
        raise ValueError(f"lineage is {lineage!r}, not 'final' or 'first'")
    own_hash = read_run(paths).spec_hash
    places: list[tuple[int, int | None]] = [(step, None) for step in paths.committed_step_numbers()]
    if lineage == "final":
        places += [(step, of) for of, steps in paths.replayed_step_numbers().items() for step in steps]
    records = []
    for step, replay_of in places:
        try:
            record = read_record(paths, step, replay_of)
            if record.spec_hash != own_hash:
                raise CorruptError(record.path(paths), _foreign(record, own_hash))
            records.append(record)
        except CorruptError as error:
            if damaged is None:
                raise
            damaged.append(error)
    return _first(records) if lineage == "first" else _final(records)


def _first(records: list[CommitRecord]) -> dict[int, CommitRecord]:
    return {record.step: record for record in records}


def _final(records: list[CommitRecord]) -> dict[int, CommitRecord]:
    if not records:
        return {}
    last = max(records, key=lambda record: (record.step, record.attempt))
    segments = {segment.attempt: segment for segment in last.lineage}
    chosen = [
        record
        for record in records
        if (segment := segments.get(record.attempt)) is not None
        and segment.first_step <= record.step <= (segment.last_step or last.step)
    ]
    return {record.step: record for record in sorted(chosen, key=lambda record: record.step)}


def _foreign(record: CommitRecord, own_hash: str) -> str:
    return f"belongs to another run: its spec hash is {record.spec_hash[:80]}, this run's is {own_hash}"


def verify_step(paths: RunPaths, record: CommitRecord) -> StepCheck:
    """Compare a step's NPZ file with its record: size and SHA-256. Reads the whole file, decodes nothing.

    Raises:
        NotARunError, SchemaVersionError: of ``run.json``.
        StorageError: the file cannot be read, so nothing is known about it.
    """
    path = record.npz(paths)
    own_hash = read_run(paths).spec_hash
    if record.spec_hash != own_hash:
        return StepCheck(status="foreign", reason=_foreign(record, own_hash), path=path)
    try:
        sha256, num_bytes = sha256_file(path, root_dir=paths.root_dir)
    except FileNotFoundError:
        return StepCheck(status="missing", reason="the file is not there", path=path)
    except CorruptError as error:
        return StepCheck(status="foreign", reason=error.reason, path=path)
    return compare(record, path, sha256, num_bytes)


def compare(record: CommitRecord, path: Path, sha256: str, num_bytes: int) -> StepCheck:
    """Hold a file's digest and size against its record."""
    if num_bytes != record.bytes:
        reason = f"has {num_bytes} bytes, its record says {record.bytes}"
        return StepCheck(status="torn", reason=reason, path=path)
    if sha256 != record.sha256:
        reason = f"has SHA-256 {sha256}, its record says {record.sha256}"
        return StepCheck(status="corrupt", reason=reason, path=path)
    return StepCheck(status="ok", reason="", path=path)


def missing_steps(paths: RunPaths, total_steps: int) -> list[int]:
    """The steps from 1 to ``total_steps`` that are not committed; raises as `committed_steps`."""
    committed = committed_steps(paths)
    return [step for step in range(1, total_steps + 1) if step not in committed]


def find_commit(paths: RunPaths, attempt: int, step: int) -> CommitRecord | None:
    """The commit of a step by one attempt, wherever it lies; raises as `read_record` does."""
    for replay_of in (None, attempt):
        try:
            record = read_record(paths, step, replay_of)
        except FileNotFoundError:
            continue
        if record.attempt == attempt:
            return record
    return None


def resume_segments(
    paths: RunPaths, attempt: int, step: int, from_attempt: int | None = None
) -> tuple[Segment, ...]:
    """The lineage of an attempt that resumes from the checkpoint of ``step`` (0: from scratch).

    Args:
        from_attempt: the attempt that wrote the checkpoint. A checkpoint of a step is written by an attempt
        that
            committed that step before, so without this argument the highest lower one of those is taken.

    Raises:
        CorruptError: no such attempt committed the step.
    """
    if step == 0:
        return (Segment(attempt, 1, None),)
    lower = range(attempt - 1, 0, -1) if from_attempt is None else (from_attempt,)
    for candidate in lower:
        commit = find_commit(paths, candidate, step) if 0 < candidate < attempt else None
        if commit is not None:
            return (*commit.lineage, Segment(attempt, step + 1, None))
    who = "no earlier attempt" if from_attempt is None else f"attempt {from_attempt}"
    raise CorruptError(
        paths.step_record(step),
        f"attempt {attempt} would resume from the checkpoint of step {step}, which {who} committed",
        "move the checkpoints of this run away, so that it starts from scratch; committed steps are kept",
    )
