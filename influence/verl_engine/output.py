"""From the scored rows of all ranks to one committed step, and to what verl's metrics say about it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from influence.config import TracerConfig
from influence.rundir import RunPaths, RunSpec, StepArrays, StepWriter, read_run
from influence.verl_engine import environment
from influence.verl_engine.fused import WAYS
from influence.verl_engine.step_rows import ScoredRow

_TIMING_PREFIX = "timing_s/influence_"
_COUNT_PREFIX = "influence_trace/"


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step's tracing did, the same on every rank."""

    counts: Mapping[str, float]
    """Sums over the ranks; ``*_fraction``: of the captured rows of all ranks."""
    timings_s: Mapping[str, float]
    """By phase, of the one rank whose scoring took longest: maxima phase by phase would not add up."""

    def as_verl_metrics(self) -> dict[str, float]:
        """By their names in verl's metrics.

        Every rank reports the same numbers and reports them once a step, because verl would average them over
        ranks, and over mini-batches.
        """
        timings = {f"{_TIMING_PREFIX}{name}": seconds for name, seconds in self.timings_s.items()}
        return {f"{_COUNT_PREFIX}{name}": float(count) for name, count in self.counts.items()} | timings


class RunOutput:
    """The run directory as one attempt's engine sees it."""

    def __init__(self, paths: RunPaths, run: RunSpec, attempt: int) -> None:
        self._paths = paths
        self._run = run
        self._attempt = attempt
        self.tracer_config = TracerConfig.from_mapping(run.spec["influence"])

    @classmethod
    def from_environment(cls) -> RunOutput:
        """The run and attempt that the trainer's environment names.

        Raises:
            KeyError: it names none.
            RunDirError: the run cannot be read.
        """
        paths = RunPaths(Path(os.environ[environment.RUN_DIR]))
        return cls(paths, read_run(paths), int(os.environ[environment.ATTEMPT]))

    @cached_property
    def _writer(self) -> StepWriter:
        return StepWriter(self._paths, self._attempt, self._run.spec_hash, store=self._run.spec["store"])

    def commit(
        self,
        step: int,
        rows: Sequence[ScoredRow],
        counts: Mapping[str, int],
        timings_s: Mapping[str, float],
        process_group: dist.ProcessGroup | None,
    ) -> StepReport:
        """Commit the step's rows of all ranks, on the first rank. Collective over the group.

        Args:
            counts: of this rank.
            timings_s: of this rank, by phase.

        Raises:
            FencedError: a later attempt has begun. StorageError: the filesystem refused. Both on the first
            rank only; the others wait for it in the next collective, until the trainer ends them.
        """
        started_s = time.perf_counter()
        report = _report(counts, timings_s, process_group)
        parts = _gather_to_first_rank(_columns(rows, self.tracer_config.positions), process_group)
        if parts is not None:
            arrays = _merge(parts, self.tracer_config)
            self._writer.commit(
                step, arrays, timings=report.timings_s, metrics={**report.counts, **_summary(arrays)}
            )
        return StepReport(report.counts, {**report.timings_s, "commit": time.perf_counter() - started_s})


def _report(
    counts: Mapping[str, int], timings_s: Mapping[str, float], process_group: dist.ProcessGroup | None
) -> StepReport:
    everywhere = [(dict(counts), dict(timings_s))]
    if process_group is not None:
        everywhere *= dist.get_world_size(process_group)
        dist.all_gather_object(everywhere, (dict(counts), dict(timings_s)), group=process_group)
    sums = {name: sum(c[name] for c, _ in everywhere) for name in counts}
    return StepReport(
        _with_fractions(sums),
        max((timings for _, timings in everywhere), key=lambda timings: timings.get("pop_rows", 0.0)),
    )


def _with_fractions(sums: Mapping[str, int]) -> dict[str, float]:
    """The sums over the ranks, with those of rows by way of capture as fractions of all captured rows."""
    rows = {name: sums[f"{name}_rows"] for name in (*WAYS, "on_policy") if f"{name}_rows" in sums}
    num_captured = sum(rows.get(name, 0) for name in WAYS)
    others = {name: count for name, count in sums.items() if name.removesuffix("_rows") not in rows}
    return others | {f"{name}_fraction": count / max(1, num_captured) for name, count in rows.items()}


def _gather_to_first_rank(
    own: dict[str, Any], process_group: dist.ProcessGroup | None
) -> list[dict[str, Any]] | None:
    """Every rank's columns on the group's first rank, None elsewhere."""
    if process_group is None:
        return [own]
    is_first = dist.get_rank(process_group) == 0
    parts: list[dict[str, Any]] | None = [{}] * dist.get_world_size(process_group) if is_first else None
    dist.gather_object(own, parts, dst=dist.get_global_rank(process_group, 0), group=process_group)
    return parts


def _columns(rows: Sequence[ScoredRow], positions: str) -> dict[str, Any]:
    """This rank's rows as flat columns, so that few objects travel: n rows, t captured tokens.

    Args:
        positions: the tracer's option; which of a row's positions it numbered.
    """
    captured = [_captured_positions(row, positions) for row in rows]

    def per_token(values: list[np.ndarray], dtype: Any) -> np.ndarray:
        return np.concatenate([np.empty(0, dtype), *values]).astype(dtype)

    places = list(zip((row.row for row in rows), captured, strict=True))
    no_scores = np.empty(0, np.float32)
    scores = [no_scores if row.scores is None else row.scores.scores.numpy() for row in rows]
    return {
        "length": np.array([len(index) for index in captured], np.int64),
        "scores": per_token(scores, np.float32),
        "positions": per_token(captured, np.int64),
        "token_ids": per_token([row.tokens_at(index) for row, index in places], np.int64),
        "log_probs": per_token([row.log_probs_at(index) for row, index in places], np.float32),
        "advantages": per_token([row.advantages_at(index) for row, index in places], np.float32),
        "uid": [row.row.uid for row in rows],
        "prompt_index": np.array([row.row.prompt_index for row in rows], np.int64),
        "session_id": np.array([row.row.session_id for row in rows], np.int64),
        "reward": np.array([row.row.reward for row in rows], np.float32),
        "accepted": np.array([row.accepted for row in rows], np.bool_),
        "scored": np.array([row.scores is not None and row.scores.scored for row in rows], np.bool_),
        "group_id": np.array([row.group_id for row in rows], np.int64),
        "response_length": np.array([len(row.row.mask) for row in rows], np.int64),
    }


_PER_TOKEN = ("scores", "positions", "token_ids", "log_probs", "advantages")


def _captured_positions(row: ScoredRow, positions: str) -> np.ndarray:
    """The row's positions that have a score, increasing, int64."""
    if row.scores is None:
        return np.empty(0, np.int64)
    return row.row.positions(positions)[row.scores.positions.numpy()]


def _merge(parts: Sequence[dict[str, Any]], config: TracerConfig) -> StepArrays:
    """One step out of the ranks' columns, rows ordered by prompt and session wherever they were computed."""
    uid = [uid for part in parts for uid in part["uid"]]
    merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "uid"}
    order = sorted(
        range(len(uid)), key=lambda r: (merged["prompt_index"][r], uid[r], merged["session_id"][r])
    )
    starts = np.concatenate([[0], np.cumsum(merged["length"])]).astype(np.int64)
    tokens = np.concatenate([np.empty(0, np.int64), *(np.arange(starts[r], starts[r + 1]) for r in order)])
    rows = {name: column[order] for name, column in merged.items() if name not in _PER_TOKEN}
    by_token = {name: merged[name][tokens] for name in _PER_TOKEN}
    row_offsets = np.concatenate([[0], np.cumsum(rows.pop("length"))]).astype(np.int64)
    return StepArrays(
        **rows,
        row_offsets=row_offsets,
        row_id=np.arange(len(order)),
        uid=[uid[r] for r in order],
        scores=by_token["scores"],
        token_ids=by_token["token_ids"],
        log_probs=by_token["log_probs"],
        positions=_positions_unless_leading(by_token["positions"], row_offsets),
        advantages=_advantages_by_row_where_constant(by_token["advantages"], row_offsets),
        tracer_config=config.to_mapping(),
    )


def _positions_unless_leading(positions: np.ndarray, row_offsets: np.ndarray) -> np.ndarray | None:
    lengths = np.diff(row_offsets)
    leading = np.arange(len(positions)) - np.repeat(row_offsets[:-1], lengths)
    return None if np.array_equal(positions, leading) else positions


def _advantages_by_row_where_constant(advantages: np.ndarray, row_offsets: np.ndarray) -> np.ndarray:
    lengths = np.diff(row_offsets)
    by_row = np.zeros(len(lengths), advantages.dtype)  # 0 for a row without a captured token
    by_row[lengths > 0] = advantages[row_offsets[:-1][lengths > 0]]
    return by_row if np.array_equal(np.repeat(by_row, lengths), advantages) else advantages


def _summary(arrays: StepArrays) -> dict[str, float]:
    if arrays.num_rows == 0:
        return {}
    return {"mean_reward": float(np.mean(arrays.reward)), "num_accepted": float(np.sum(arrays.accepted))}
