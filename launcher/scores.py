"""Counts what a score file contains; the only module of a collect that needs numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from influence.rundir.arrays import StepArrays
from influence.rundir.npz import decode
from launcher.manifest import ScoreFacts


def count_scores(npz: Path, sha256: str) -> ScoreFacts:
    """Decode a score file and count.

    Args:
        sha256: of the file, as verified.

    Raises:
        CorruptError: not a score file: cut short, pickled, columns that contradict one another.
        SchemaVersionError: another version wrote it.
    """
    return _facts(decode(npz), sha256)


def _facts(arrays: StepArrays, sha256: str) -> ScoreFacts:
    scores = np.asarray(arrays.scores)
    lengths_R = np.diff(arrays.row_offsets)
    in_scored_row_T = np.repeat(np.asarray(arrays.scored), lengths_R)
    finite_T = np.isfinite(scores)
    measured = scores[finite_T & in_scored_row_T]
    quantiles = {}
    if measured.size:
        quantiles = {
            "min": float(measured.min()),
            "median": float(np.median(measured)),
            "max": float(measured.max()),
        }
    return ScoreFacts(
        sha256=sha256,
        num_rows=arrays.num_rows,
        num_scored_rows=int(np.count_nonzero(arrays.scored)),
        num_accepted_rows=int(np.count_nonzero(arrays.accepted)),
        num_groups=len(np.unique(arrays.group_id)),
        num_positions=arrays.num_positions,
        num_expected_positions=_num_expected_positions(arrays),
        num_nan=int(np.count_nonzero(np.isnan(scores))),
        num_infinite=int(np.count_nonzero(np.isinf(scores))),
        num_nonzero=int(np.count_nonzero(measured)),
        quantiles=quantiles,
    )


def _num_expected_positions(arrays: StepArrays) -> int:
    """One score a response token, or the cap where a response is longer.

    Where prompts are scored too, nothing in the file says how long they are: their scores are taken as they
    are.
    """
    cap = arrays.tracer_config.get("max_tokens_per_response", -1)
    lengths = np.asarray(arrays.response_length, dtype=np.int64)
    if arrays.positions is not None and arrays.tracer_config.get("positions") == "all":
        lengths = lengths + _num_prompt_scores(arrays)
    if isinstance(cap, int) and cap >= 0:
        lengths = np.minimum(lengths, cap)
    return int(lengths.sum())


def _num_prompt_scores(arrays: StepArrays) -> Any:
    """[R], the scores of each row that belong to its prompt; of a capped row at most all its scores."""
    assert arrays.positions is not None  # noqa: S101  (the caller looked)
    before_T = np.concatenate([[0], np.cumsum(np.asarray(arrays.positions) < 0)])
    offsets = np.asarray(arrays.row_offsets)
    return before_T[offsets[1:]] - before_T[offsets[:-1]]
