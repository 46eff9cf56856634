"""Reading a committed step: verified, row by row or as one padded array."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from influence.rundir.arrays import Float32, Int64, StepArrays
from influence.rundir.errors import CorruptError, RunDirError
from influence.rundir.files import read_inside
from influence.rundir.lineage import Lineage, committed_steps, compare
from influence.rundir.npz import decode, first_positions
from influence.rundir.paths import RunPaths
from influence.rundir.record import CommitRecord


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepRow:
    """One response; n scores."""

    row_id: int
    prompt_index: int
    session_id: int
    uid: str
    reward: float
    accepted: bool
    scored: bool
    group_id: int
    response_length: int
    scores: Float32
    """[n]"""
    positions: Int64
    """[n], each score's token in the response, from 0; negative: in the prompt, whose last token is -1."""
    token_ids: Int64 | None
    """[n]"""
    log_probs: Float32 | None
    """[n]"""
    advantages: Float32 | None
    """[n]"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepView:
    """A step's arrays with the commit record that they were verified against."""

    arrays: StepArrays
    record: CommitRecord

    def rows(self) -> Iterator[StepRow]:
        """The rows in the order in which they are stored; their arrays are views, not copies."""
        arrays = self.arrays
        positions, advantages = self._positions(), self._advantages()
        for i in range(arrays.num_rows):
            span = slice(int(arrays.row_offsets[i]), int(arrays.row_offsets[i + 1]))
            yield StepRow(
                row_id=int(arrays.row_id[i]),
                prompt_index=int(arrays.prompt_index[i]),
                session_id=int(arrays.session_id[i]),
                uid=arrays.uid[i],
                reward=float(arrays.reward[i]),
                accepted=bool(arrays.accepted[i]),
                scored=bool(arrays.scored[i]),
                group_id=int(arrays.group_id[i]),
                response_length=int(arrays.response_length[i]),
                scores=arrays.scores[span],
                positions=positions[span],
                token_ids=None if arrays.token_ids is None else arrays.token_ids[span],
                log_probs=None if arrays.log_probs is None else arrays.log_probs[span],
                advantages=None if advantages is None else advantages[span],
            )

    def padded(self) -> npt.NDArray[np.float32]:
        """Scores float32 [R, length of the longest response], each at its token; NaN: not captured.

        Of the responses alone: `rows` has the scores of prompts, too.
        """
        arrays, positions = self.arrays, self._positions()
        width = max(
            int(arrays.response_length.max(initial=0)),
            int(positions.max(initial=-1)) + 1,
        )
        padded = np.full((arrays.num_rows, width), np.nan, dtype=np.float32)
        in_response = positions >= 0
        row = np.repeat(np.arange(arrays.num_rows), arrays.row_lengths)
        padded[row[in_response], positions[in_response]] = arrays.scores[in_response]
        return padded

    def _positions(self) -> Int64:
        positions = self.arrays.positions
        return first_positions(self.arrays.row_offsets) if positions is None else positions

    def _advantages(self) -> Float32 | None:
        advantages = self.arrays.advantages
        if advantages is None or len(advantages) != self.arrays.num_rows:
            return advantages
        return np.repeat(advantages, self.arrays.row_lengths)


def load_step(run_dir: Path | str | RunPaths, step: int, lineage: Lineage = "final") -> StepView:
    """A committed step of a run, or of a collected copy of one.

    Args:
        lineage: which commit, where a retry computed the step again (see `influence.rundir.lineage`).

    Raises:
        NotARunError: there is no ``run.json``.
        RunDirError: the step is not committed.
        CorruptError: its file is missing, torn or altered; names the file.
        SchemaVersionError, StorageError: as reading any file of a run.
    """
    paths = run_dir if isinstance(run_dir, RunPaths) else RunPaths(Path(run_dir))
    record = committed_steps(paths, lineage).get(step)
    if record is None:
        raise RunDirError(
            paths.step_record(step),
            f"step {step} is not committed",
            "wait for the run, or choose one of the committed steps",
        )
    path = record.npz(paths)
    try:
        data = read_inside(paths.root_dir, path, max_bytes=record.bytes)
    except FileNotFoundError:
        raise CorruptError(path, "is not there, though its record is") from None
    check = compare(record, path, hashlib.sha256(data).hexdigest(), len(data))
    if check.status != "ok":
        raise CorruptError(path, f"is {check.status}: {check.reason}")
    return StepView(arrays=decode(data, path=path), record=record)
