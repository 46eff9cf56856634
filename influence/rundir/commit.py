"""Committing a step: all of it or nothing, never over another commit, never after a later attempt began.

The order of the operations is the whole of it::

    NPZ to a temporary file, synced -> fence -> its name, exclusively -> fence -> the record, the same way

The record's name is the commit: it is set by one atomic operation that fails where the name is taken, so of
two attempts that get there at once exactly one has committed the step, and the output of the other is a
replay. A crash before that leaves a temporary file (the next claim removes it) or an NPZ without a record, an
*orphan*: no reader looks at it, and the next commit of the step takes its place.

A filesystem has no fence: an attempt can hang after it looked (on a stale network mount, say), and go on when
a later one has committed. So an orphan is moved aside, not overwritten, and whoever then finds that the step
is committed after all puts it back.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from influence.rundir import npz
from influence.rundir.arrays import StepArrays
from influence.rundir.attempts import Attempt
from influence.rundir.clock import utc_now
from influence.rundir.errors import ConflictError, RunDirError, StorageError
from influence.rundir.files import (
    make_dir,
    moved_aside,
    publish,
    sha256_file,
    temporary,
    write_atomic,
    write_json,
)
from influence.rundir.lineage import verify_step
from influence.rundir.paths import RunPaths, attempt_label
from influence.rundir.record import CommitRecord, read_record
from influence.rundir.segments import Segment
from influence.rundir.spec import read_run


class StepWriter:
    """Commits the steps of one attempt.

    Args:
        attempt_number: claimed with `claim_attempt`; the claim may be another process's.
        spec_hash: of the spec that the trainer runs; must be the run's.
        store: ``scores_dtype`` and ``columns``, as in a preset.

    Raises:
        ConflictError: the spec hash is not the run's.
        CorruptError: the attempt was never claimed, or its record cannot be read.
        ValueError: ``store`` names what does not exist.
    """

    def __init__(
        self, paths: RunPaths, attempt_number: int, spec_hash: str, *, store: Mapping[str, Any]
    ) -> None:
        own_hash = read_run(paths).spec_hash
        if spec_hash != own_hash:
            raise ConflictError(paths.run_json, [f"spec_hash: {own_hash} -> {spec_hash}"])
        self._paths = paths
        self._attempt = Attempt(paths, attempt_number)
        self._attempt.record  # noqa: B018 - it is there and can be read, or this raises
        self._label = attempt_label(attempt_number)
        self._spec_hash = spec_hash
        self._scores_dtype = str(store.get("scores_dtype", "float32"))
        self._columns = tuple(store.get("columns", npz.OPTIONAL_COLUMNS))
        npz.require_encoding(self._scores_dtype, self._columns)

    def commit(
        self, step: int, arrays: StepArrays, *, timings: Mapping[str, float], metrics: Mapping[str, float]
    ) -> CommitRecord:
        """Commit a step, as a replay if it is committed already.

        To repeat a commit of the same bytes in the same attempt does nothing and returns its record.

        Args:
            step: from 1, above the step that the attempt resumed from.
            timings: seconds a phase.

        Raises:
            FencedError: a later attempt has begun; nothing was committed.
            StorageError: the filesystem refused; nothing was committed, no temporary file is left.
            CorruptError: the record of the step's first commit cannot be used.
            ValueError: the arrays do not fit together, the step is not above the resume point, or this
                attempt committed it with other bytes.
            TypeError: a timing or a metric is no number, or the tracer's options are not JSON.
        """
        self._attempt.require_unfenced()
        data = npz.encode(arrays, scores_dtype=self._scores_dtype, columns=self._columns)
        record = self._record(step, arrays, data, timings, metrics)
        try:
            return self._commit_first(record, data) or self._commit_replay(record, data)
        except StorageError:
            self._attempt.require_unfenced()  # the claim of a later attempt removes our temporary files
            raise

    def _record(
        self,
        step: int,
        arrays: StepArrays,
        data: bytes,
        timings: Mapping[str, float],
        metrics: Mapping[str, float],
    ) -> CommitRecord:
        attempt = self._attempt.record
        if step <= attempt.resumed_from:
            raise ValueError(
                f"step {step} is not above step {attempt.resumed_from}, where the attempt resumed"
            )
        return CommitRecord(
            step=step,
            file=self._paths.step_npz(step).name,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            rows=arrays.num_rows,
            positions=arrays.num_positions,
            nan_count=int(np.count_nonzero(np.isnan(arrays.scores))),
            spec_hash=self._spec_hash,
            attempt=attempt.number,
            resumed_from=attempt.resumed_from,
            lineage=(*attempt.segments[:-1], Segment(attempt.number, attempt.resumed_from + 1, step)),
            committed_at=utc_now(),
            timings={name: float(value) for name, value in timings.items()},
            metrics={name: float(value) for name, value in metrics.items()},
        )

    def _commit_first(self, record: CommitRecord, data: bytes) -> CommitRecord | None:
        """The step's first commit; None where it has one by now."""
        record_path, npz_path = self._paths.step_record(record.step), self._paths.step_npz(record.step)
        make_dir(self._paths.steps_dir)
        if os.path.lexists(record_path):
            return None
        orphans: list[Path] = []
        with ExitStack() as leftovers:
            tmp = leftovers.enter_context(temporary(npz_path, data, label=self._label))
            while True:
                self._attempt.require_unfenced()
                try:
                    publish(tmp, npz_path, exclusive=True)
                    break
                except FileExistsError:
                    if os.path.lexists(record_path):
                        return None
                orphans.append(leftovers.enter_context(moved_aside(npz_path, label=self._label)))
                if self._overtaken(record, orphans):
                    return None
            self._attempt.require_unfenced()
            try:
                write_json(record_path, record.to_dict(), exclusive=True, label=self._label)
            except FileExistsError:
                self._overtaken(record, orphans)
                return None
        return record

    def _overtaken(self, record: CommitRecord, orphans: list[Path]) -> bool:
        """Whether the step was committed meanwhile; if with an NPZ that we took for an orphan, it goes back.

        Two ways lead here: we hung before moving the orphan, and the next attempt committed the step; or
        the orphan's own attempt had hung, and wrote its record after all.
        """
        if not os.path.lexists(self._paths.step_record(record.step)):
            return False
        committed = read_record(self._paths, record.step)
        for orphan in orphans:
            if self._holds(orphan, committed):
                publish(orphan, committed.npz(self._paths), exclusive=False)
        return True

    def _commit_replay(self, record: CommitRecord, data: bytes) -> CommitRecord:
        """A commit of a step that has one; beside it, never over it."""
        self._attempt.require_unfenced()
        first = read_record(self._paths, record.step)
        if first.attempt == record.attempt:
            return self._same_again(first, record)
        record = replace(record, replay=True)
        record_path = record.path(self._paths)
        if os.path.lexists(record_path):
            return self._same_again(read_record(self._paths, record.step, record.attempt), record)
        make_dir(record_path.parent)
        # Where the NPZ under steps/ is damaged, ours is kept although the digest is the same.
        if first.sha256 == record.sha256 and verify_step(self._paths, first).status == "ok":
            record = replace(record, equal=True)
        else:
            write_atomic(record.npz(self._paths), data, label=self._label)
        self._attempt.require_unfenced()
        write_json(record_path, record.to_dict(), exclusive=True, label=self._label)
        return record

    def _same_again(self, committed: CommitRecord, record: CommitRecord) -> CommitRecord:
        if committed.sha256 != record.sha256:
            raise ValueError(
                f"attempt {record.attempt} has committed step {record.step} with other bytes before"
            )
        return committed

    def _holds(self, path: Path, record: CommitRecord) -> bool:
        """Whether a file has the bytes that a record names."""
        try:
            return sha256_file(path, root_dir=self._paths.root_dir) == (record.sha256, record.bytes)
        except (FileNotFoundError, RunDirError):
            return False
