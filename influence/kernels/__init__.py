"""The products that the tracer spends its time in, on plain tensors.

========================== ======================================================================
`project`                  inputs or output gradients of a layer, to rows of the factors
`response_gradients`       factors of a micro-batch, to the projected gradients of its responses
`score`                    factors of all micro-batches and the weights M, to the scores of tokens
========================== ======================================================================

Each has a reference in `plain`, in pure PyTorch for any device and type, and a Triton kernel in `gpu`
for what a training run has: bfloat16 factors on a GPU. The functions here choose by the tensors they
get; ``INFL_KERNELS=plain`` in the environment chooses the reference always. Both are deterministic: there
are no atomic additions.

Shapes: T tokens of a micro-batch, W slots of its factors, F and D as in `influence.layout.FactorLayout`,
R responses of a micro-batch, n responses of a step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Final

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
    "on_device",
    "project",
    "response_gradients",
    "score",
    "solves_groups",
    "token_tiles",
]

KERNELS_VARIABLE = "INFL_KERNELS"

MOST_GROUP_ROWS: Final = 64
"""Responses of a group whose system fits the registers of a kernel."""


@torch.no_grad()
def project(values_TX: Tensor, signs_KX: Tensor, source_W: Tensor, out_KW: Tensor) -> None:
    """``out[k, w] = sum_x signs[k, x] values[source[w], x]``; zero where ``source[w]`` is -1.

    `values` is of any float type, its width contiguous; `signs` holds +-1 in the factors' type; `source`
    (int32) names the token of each slot; `out` is a part of the factors, with slots contiguous. Sums are
    float32 (float64 for float64). Tokens that no slot names are not read. Modules that share an input
    can be projected at once: their rows of v are neighbours.
    """
    if _has_kernel(out_KW):
        from influence.kernels.gpu.project import project as project_on_gpu

        project_on_gpu(values_TX, signs_KX, source_W, out_KW)
    else:
        plain.project(values_TX, signs_KX, source_W, out_KW)


@torch.no_grad()
def response_gradients(factors_FW: Tensor, row_slots: RowSlots, layout: FactorLayout, out_RD: Tensor) -> None:
    """``G_r = scale sum_w u_w v_w^T`` over the slots of each of R rows, for every module.

    `row_slots` are R pairs (first slot, end slot) on the host; first slots are multiples of
    `SLOT_ALIGNMENT`. `out` is float32 or float64 and is overwritten. Sums are float32 at least, whatever
    the process allows TF32 for.
    """
    if _has_kernel(factors_FW):
        from influence.kernels.gpu.response_gradients import response_gradients as gradients_on_gpu

        gradients_on_gpu(factors_FW, row_slots, layout, out_RD)
    else:
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
    if chunks and _has_kernel(chunks[0]):
        from influence.kernels.gpu.score import score as score_on_gpu

        score_on_gpu(chunks, tiles, weights_nD, is_finite_nm, layout, out)
    else:
        plain.score(chunks, tiles, weights_nD, is_finite_nm, layout, out)


def solves_groups(gradients: Tensor, num_rows: int) -> bool:
    """Whether groups of so many responses are solved by `influence.kernels.gpu.group_solve`."""
    is_fit = gradients.is_cuda and gradients.dtype == torch.float32 and num_rows <= MOST_GROUP_ROWS
    return is_fit and _may_use_kernels()


def _has_kernel(factors: Tensor) -> bool:
    return factors.is_cuda and factors.dtype == torch.bfloat16 and _may_use_kernels()


def _may_use_kernels() -> bool:
    choice = os.environ.get(KERNELS_VARIABLE, "auto")
    if choice not in ("auto", "plain"):
        raise ValueError(f"{KERNELS_VARIABLE} is {choice!r}; it can be 'auto' (the default) or 'plain'")
    return choice == "auto" and _triton_is_installed()


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None
