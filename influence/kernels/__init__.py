"""The four products that the tracer spends its time in, on plain tensors.

========================== ======================================================================
`project`                  inputs or output gradients of a layer, to rows of the factors
`response_gradients`       factors of a micro-batch, to the projected gradients of its responses
`score`                    factors of all micro-batches and the weights M, to the scores of tokens
`damped_inverse`           Gram matrices, to the inverses that weights are made of
========================== ======================================================================

`plain` has each in pure PyTorch, for any device and type.

Shapes: T tokens of a micro-batch, W slots of its factors, F and D as in `influence.layout.FactorLayout`,
R responses of a micro-batch, n responses of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from influence.kernels import plain
from influence.kernels.plain import RowSlots
from influence.kernels.tiles import SLOT_ALIGNMENT, TILE_SLOTS, on_device, token_tiles
from influence.layout import FactorLayout

__all__ = [
    "SLOT_ALIGNMENT",
    "TILE_SLOTS",
    "RowSlots",
    "damped_inverse",
    "on_device",
    "project",
    "response_gradients",
    "score",
    "token_tiles",
]


@torch.no_grad()
def project(values_TX: Tensor, signs_KX: Tensor, source_W: Tensor, out_KW: Tensor) -> None:
    """``out[k, w] = sum_x signs[k, x] values[source[w], x]``; zero where ``source[w]`` is -1.

    `values` is of any float type, its width contiguous; `signs` holds +-1 in the factors' type; `source`
    (int32) names the token of each slot; `out` is a part of the factors, with slots contiguous. Sums are
    float32 (float64 for float64). Tokens that no slot names are not read. Modules that share an input
    can be projected at once: their rows of v are neighbours.
    """
    plain.project(values_TX, signs_KX, source_W, out_KW)


@torch.no_grad()
def response_gradients(factors_FW: Tensor, row_slots: RowSlots, layout: FactorLayout, out_RD: Tensor) -> None:
    """``G_r = scale sum_w u_w v_w^T`` over the slots of each of R rows, for every module.

    `row_slots` are R pairs (first slot, end slot) on the host; first slots are multiples of
    `SLOT_ALIGNMENT`. `out` is float32 or float64 and is overwritten. Sums are float32 at least, whatever
    the process allows TF32 for.
    """
    plain.response_gradients(factors_FW, row_slots, layout, out_RD)


@torch.no_grad()
def score(
    chunks: Sequence[Tensor],
    tiles: Tensor,
    weights_nD: Tensor,
    is_finite_nm: Tensor,
    layout: FactorLayout,
    out: Tensor,
) -> None:
    """``s_w = sum_m u_w^T M_m v_w`` of every slot of every chunk (the factors ``[F, W_i]`` of a micro-batch).

    `tiles` (int32 [num_tiles, 4], made by `token_tiles`, on the chunks' device) says which slots belong to
    which of the n rows; slots in no tile get zero. Where `is_finite` (bool [n, modules]) is false, a
    module adds nothing to that row, whatever its factors and weights hold. `weights` carry the scale of both
    projections. `out` is ``[sum W_i]``, the chunks one after another, in float32 or float64.
    """
    plain.score(chunks, tiles, weights_nD, is_finite_nm, layout, out)


@torch.no_grad()
def damped_inverse(gram_BRR: Tensor, damping_B: Tensor) -> tuple[Tensor, Tensor]:
    """``(K + lambda I)^-1`` of B symmetric systems in float64, and which of them are not positive definite.

    Where lambda is not above zero, the system has no direction: its inverse is zero, and it did not fail.
    The inverse of a failed system is zero, too. Returns (inverse [B, R, R], failed bool [B]).
    """
    return plain.damped_inverse(gram_BRR, damping_B)
