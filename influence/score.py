"""Scores of tokens from their captured factors. Never a solve per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from influence.capture import MicroBatch
from influence.layout import FactorLayout
from influence.weights import RowWeights


@dataclass(frozen=True, slots=True, eq=False)
class RowScores:
    """The scores of one response (n captured tokens), on the CPU."""

    row_id: int
    scores: Tensor
    """float32 [n]; float64 for a float64 model. Zeros where not scored, never NaN."""
    positions: Tensor
    """int64 [n]: each token's index among the tokens that row_ids marked for this row, before capping."""
    total: float
    """``sum_m <H_m^-1 d_m, G_m>`` of the response, from the Gram matrices; the scores add up to it."""
    scored: bool
    """False: its group has no contrast, or none of its gradients is finite."""


@torch.no_grad()
def token_scores(u_TO: Tensor, v_TI: Tensor, M_OI: Tensor) -> Tensor:
    """``s_t = u_t^T M v_t = <M, g_t>``, [..., T], computed in float64; leading dimensions are modules.

    ``M = unvec(H^-1 d)`` weights a projected gradient. A score belongs to a *position* and is no loss
    term: the gradient at a position carries the losses of all later tokens. Summed over a response's
    positions or over its loss terms the two decompositions agree: both give ``<M, G_r>``.
    """
    return ((u_TO.double() @ M_OI.double()) * v_TI.double()).sum(-1)


def score_micro_batch(
    batch: MicroBatch, place: Mapping[int, int], weights: RowWeights, layout: FactorLayout
) -> list[Tensor]:
    """The scores of a micro-batch's T tokens by class of module shape, each [T], summed over its modules.

    `place` gives a row id's index among the n rows of `weights`. Rows that are not scored get zeros, and a
    module whose gradient of a row is not finite adds nothing to that row.
    """
    scores = []
    for captured, kind in zip(batch.classes, layout.classes, strict=True):
        M_CnD = kind.of(weights.matrices).transpose(0, 1)
        is_finite_Cn = weights.is_finite[:, list(kind.members)].T
        module_E = torch.tensor(captured.module_of_call, device=M_CnD.device)
        shape = (captured.u.shape[2], captured.v.shape[2])
        by_row = []
        for row_id, (start, end) in zip(
            batch.selection.row_ids, pairwise(batch.selection.row_offsets), strict=True
        ):
            row = place[row_id]
            if not weights.is_scored[row]:
                # Not by a zero M: what was captured there may be NaN.
                by_row.append(torch.zeros(end - start, dtype=torch.float64, device=M_CnD.device))
                continue
            s_ET = token_scores(
                captured.u[:, start:end],
                captured.v[:, start:end],
                M_CnD[module_E, row].reshape(-1, *shape),
            )
            by_row.append(s_ET.masked_fill(~is_finite_Cn[module_E, row, None], 0.0).sum(0))
        scores.append(torch.cat(by_row))
    return scores


def emit_rows(
    batches: Sequence[MicroBatch],
    scores: Sequence[Sequence[Tensor]],
    place: Mapping[int, int],
    weights: RowWeights,
) -> list[RowScores]:
    """Add the classes up, bring the scores to the CPU in one copy, and cut them into rows."""
    if not batches:
        return []
    flat = torch.cat([torch.stack(list(by_class)).sum(0) for by_class in scores])
    flat = flat.to(batches[0].classes[0].gradients.dtype).cpu()
    rows = []
    for batch, part in zip(
        batches, torch.split(flat, [b.selection.row_offsets[-1] for b in batches]), strict=True
    ):
        for row_id, (start, end) in zip(
            batch.selection.row_ids, pairwise(batch.selection.row_offsets), strict=True
        ):
            index = place[row_id]
            rows.append(
                RowScores(
                    row_id=row_id,
                    scores=part[start:end].clone(),
                    positions=batch.selection.positions[start:end].clone(),
                    total=weights.total[index],
                    scored=weights.is_scored[index],
                )
            )
    return sorted(rows, key=lambda row: row.row_id)
