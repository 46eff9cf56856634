"""Scores of tokens from their captured factors. Never a solve per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from influence import kernels
from influence.kernels import on_device, token_tiles
from influence.layout import FactorLayout
from influence.micro_batch import MicroBatch


@dataclass(frozen=True, slots=True, eq=False)
class RowScores:
    """The scores of one response (n captured tokens), on the CPU."""

    row_id: int
    scores: Tensor
    """float32 [n]; float64 for a float64 model. Zeros where not scored, never NaN. A view: one tensor holds
    the scores of all rows of a call."""
    positions: Tensor
    """int64 [n]: each token's index among the tokens that row_ids marked for this row, before capping."""
    total: float
    """``sum_m <H_m^-1 d_m, G_m>`` of the response, from the Gram matrices; the scores add up to it."""
    scored: bool
    """False: its group has no contrast, or none of its gradients is finite."""


@dataclass(frozen=True, slots=True, eq=False)
class ScorePlan:
    """Which slots of the captured factors are weighted by which of the n rows, in order of their ids.

    Made by the host while the device is at work on something else.
    """

    factors: tuple[Tensor, ...]
    """Of all micro-batches, then those that hold second and later calls of a module."""
    tiles: Tensor
    """int32, on the device; see `influence.kernels.token_tiles`."""
    row_slots: NDArray[np.int64]
    """[n, 2]: a row's first and end slot among those of all micro-batches."""
    num_slots: int
    """Of all micro-batches, without further factors."""
    further: tuple[tuple[int, int, int], ...]
    """For each of the further factors: where its scores start, to where they are added, and how many."""
    gradient_scale: Tensor | None
    """float64 [n], on the device; None where all are 1."""


@torch.no_grad()
def token_scores(u_TO: Tensor, v_TI: Tensor, M_OI: Tensor) -> Tensor:
    """``s_t = u_t^T M v_t = <M, g_t>``, [..., T], computed in float64; leading dimensions are modules.

    ``M = unvec(H^-1 d)`` weights a projected gradient. A score belongs to a *position* and is no loss
    term: the gradient at a position carries the losses of all later tokens. Summed over a response's
    positions or over its loss terms the two decompositions agree: both give ``<M, G_r>``.
    """
    return ((u_TO.double() @ M_OI.double()) * v_TI.double()).sum(-1)


def plan_scores(
    batches: Sequence[MicroBatch],
    place_of: NDArray[np.int64],
    is_scored: NDArray[np.bool_],
    device: torch.device,
) -> ScorePlan:
    """Plan the scoring of all micro-batches.

    `place_of` gives, for every captured row in the order of the micro-batches, its index among the n rows;
    rows that are not scored (`is_scored` [n]) get no tiles: what was captured there may be NaN.
    """
    num_slots = [batch.selection.num_slots for batch in batches]
    starts = np.cumsum([0, *num_slots])
    batch_of = np.repeat(np.arange(len(batches)), [len(batch.selection.row_ids) for batch in batches])
    slots_n2 = np.concatenate(
        [np.empty((0, 2), np.int32), *(batch.selection.row_slots for batch in batches)], dtype=np.int64
    )
    row_slots = np.empty_like(slots_n2)
    row_slots[place_of] = slots_n2 + starts[batch_of, np.newaxis]

    table = np.column_stack([batch_of, slots_n2, place_of])[is_scored[place_of]]
    tables, further = [table], []
    factors = [batch.factors[0] for batch in batches]
    start = int(starts[-1])
    for index, batch in enumerate(batches):
        for part in batch.factors[1:]:
            more = table[table[:, 0] == index]
            more[:, 0] = len(factors)
            tables.append(more)
            further.append((start, int(starts[index]), num_slots[index]))
            factors.append(part)
            start += num_slots[index]
    return ScorePlan(
        factors=tuple(factors),
        tiles=on_device(token_tiles(*np.concatenate(tables).T), device),
        row_slots=row_slots,
        num_slots=int(starts[-1]),
        further=tuple(further),
        gradient_scale=_gradient_scale(batches, place_of, device),
    )


@torch.no_grad()
def score_slots(plan: ScorePlan, weights_nD: Tensor, is_finite_nm: Tensor, layout: FactorLayout) -> Tensor:
    """The scores of all slots, [plan.num_slots] on the device, in the type of the weights.

    A row's weights are multiplied by its gradient scale, as its captured gradients are in ``G_r``. A module
    whose gradient of a row is not finite adds nothing to that row.
    """
    if plan.gradient_scale is not None:
        weights_nD = weights_nD * plan.gradient_scale.to(weights_nD.dtype).unsqueeze(1)
    scores = weights_nD.new_empty(sum(factors_FW.shape[1] for factors_FW in plan.factors))
    kernels.score(plan.factors, plan.tiles, weights_nD, is_finite_nm, layout, scores)
    for start, to, width in plan.further:
        scores[to : to + width] += scores[start : start + width]
    return scores[: plan.num_slots]


def emit_rows(
    batches: Sequence[MicroBatch],
    place_of: NDArray[np.int64],
    scores: Tensor,
    row_slots: NDArray[np.int64],
    total: Sequence[float],
    is_scored: Sequence[bool],
) -> list[RowScores]:
    """Cut the scores of all slots into rows in the order of their ids: views, and none is read yet."""
    if not batches:
        return []
    # Rows lie one after another, each followed by the slots that fill it up to a multiple of the alignment.
    cuts = np.append(row_slots[place_of].reshape(-1), scores.numel())
    row_scores = torch.split(scores, np.diff(cuts).tolist())[::2]
    positions = [
        part
        for batch in batches
        for part in torch.split(
            batch.selection.positions, np.diff(np.asarray(batch.selection.row_offsets)).tolist()
        )
    ]
    row_ids = [row_id for batch in batches for row_id in batch.selection.row_ids]
    order = np.argsort(place_of).tolist()
    return [
        RowScores(row_ids[index], row_scores[index], positions[index], total[row], is_scored[row])
        for row, index in enumerate(order)
    ]


def _gradient_scale(
    batches: Sequence[MicroBatch], place_of: NDArray[np.int64], device: torch.device
) -> Tensor | None:
    if all(batch.gradient_scale is None for batch in batches):
        return None
    captured = np.concatenate(
        [
            np.ones(len(batch.selection.row_ids)) if scale is None else scale.numpy()
            for batch in batches
            for scale in [batch.gradient_scale]
        ]
    )
    by_row = np.empty_like(captured)
    by_row[place_of] = captured
    return on_device(by_row, device)
