"""The rows of one training step on one rank: which have been seen, how they are grouped, what they scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch.distributed as dist

from influence.config import TracerConfig
from influence.score import RowScores
from influence.tracer import InfluenceTracer
from influence.verl_engine.rows import NOT_CAPTURED, Row


@dataclass(frozen=True, slots=True, eq=False)
class ScoredRow:
    """A row of the step with its group and its scores."""

    row: Row
    accepted: bool
    group_id: int
    scores: RowScores | None
    """None: it has no token of the policy's own, so nothing was captured."""


class StepRows:
    """Collects rows over the mini-batches of a step, then scores them."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._keys: set[tuple[str, int]] = set()

    def add(self, rows: list[Row]) -> list[int] | None:
        """Ids for the rows of a mini-batch, -1 for padding; None where the step has seen them all before.

        Epochs after the first visit every row again. All ranks are in the same epoch, so that all get ids
        or none does: what follows is collective.

        Raises:
            ValueError: some rows are new and some are not, which no sequence of epochs makes.
        """
        num_known = sum(row.key in self._keys for row in rows)
        if num_known == len(rows):
            return None
        if num_known:
            raise ValueError(
                f"{num_known} of {len(rows)} rows of a mini-batch were in an earlier one of this step"
            )
        first = len(self._rows)
        self._rows += rows
        self._keys.update(row.key for row in rows)
        return [NOT_CAPTURED if row.is_padding else first + b for b, row in enumerate(rows)]

    def score(
        self,
        tracer: InfluenceTracer,
        process_group: dist.ProcessGroup | None,
        mean_ratio: Mapping[int, float],
    ) -> list[ScoredRow]:
        """Score all rows but padding, in the order in which they were seen. Collective over the group.

        Args:
            mean_ratio: by row id, the mean ratio of the new to the old policy over the row's own tokens.
        """
        config = tracer.config
        kept = [(row_id, row) for row_id, row in enumerate(self._rows) if not row.is_padding]
        group_ids = _group_ids((row for _, row in kept), config, process_group)
        accepted = {row_id: row.reward > config.accepted_above for row_id, row in kept}
        captured = [(row_id, row) for row_id, row in kept if row.mask.any()]
        emitted = tracer.pop_rows(
            groups=[group_ids[row.uid] for _, row in captured],
            contrast=[
                _contrast(row, accepted[row_id], mean_ratio.get(row_id, 1.0), config)
                for row_id, row in captured
            ],
        )
        scores = {row_scores.row_id: row_scores for row_scores in emitted}
        return [
            ScoredRow(row, accepted[row_id], group_ids[row.uid], scores.get(row_id)) for row_id, row in kept
        ]


def _contrast(row: Row, accepted: bool, mean_ratio: float, config: TracerConfig) -> float:
    if config.contrast == "none":
        return 1.0
    if config.contrast == "mean_ratio":
        return mean_ratio
    if config.contrast == "accepted_minus_rejected":
        return 1.0 if accepted else -1.0
    # GRPO's advantage is one number a response; estimators with one a token are averaged.
    return float(row.advantages[row.mask].mean())


def _group_ids(
    rows: Iterable[Row], config: TracerConfig, process_group: dist.ProcessGroup | None
) -> dict[str, int]:
    """A number for each prompt's group, the same on every rank: prompts in the order of their index.

    The index alone would not do: data without ``extra_info.index`` gives every prompt the index 0.
    """
    own = sorted({(row.prompt_index, row.uid) for row in rows})
    everywhere = [own]
    if process_group is not None:
        everywhere = [[] for _ in range(dist.get_world_size(process_group))]
        dist.all_gather_object(everywhere, own, group=process_group)
    if config.scope == "batch":
        return {uid: 0 for keys in everywhere for _, uid in keys}
    ordered = sorted({key for keys in everywhere for key in keys})
    return {uid: group_id for group_id, (_, uid) in enumerate(ordered)}
