"""Groups of responses solved on a GPU in one launch, from their gradients to the weights of their tokens.

The systems are small and many (16 x 16, for each of 196 modules and six groups in the reference run), so that
with a launch for every step the host would take longer than the device takes to score all tokens. Here a
program holds one system in registers, in float64: it reads the gradients twice, and writes M.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from influence.kernels.tiles import on_device
from influence.layout import FactorLayout
from influence.usable_range import UsableRange

RULES: Final = {"identity": 0, "trace_over_responses": 1, "trace_over_dim": 2}
"""What the curvature and its damping are made of, as the kernel is told."""


@triton.jit
def _solve_kernel(
    gradients: tl.tensor,
    rows: tl.tensor,
    contrast: tl.tensor,
    local: tl.tensor,
    modules: tl.tensor,
    scales: tl.tensor,
    weights: tl.tensor,
    notes: tl.tensor,
    is_finite: tl.tensor,
    gradients_stride: tl.tensor,
    weights_stride: tl.tensor,
    is_finite_stride: tl.tensor,
    num_groups: tl.tensor,
    num_rows: tl.tensor,
    damping: tl.tensor,
    RULE: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    NEEDS_BOTH_SIGNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SQUARED_NORM_BELOW: tl.constexpr,
    LEAST_DAMPING: tl.constexpr,
) -> None:
    module, group = tl.program_id(0), tl.program_id(1)
    start = tl.load(modules + 4 * module)
    dim = tl.load(modules + 4 * module + 1)
    r = tl.arange(0, BLOCK_R)
    is_row = r < num_rows
    i, j = r[:, None], r[None, :]
    inside = is_row[:, None] & is_row[None, :]
    row = tl.load(rows + group * num_rows + r, mask=is_row, other=0)
    of_row = gradients + row * gradients_stride + start
    K = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float64)
    for first in range(0, dim, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        G = tl.load(of_row[:, None] + d[None, :], mask=is_row[:, None] & (d < dim)[None, :], other=0.0)
        G = G.to(tl.float64)
        K = tl.dot(G, tl.trans(G), K, out_dtype=tl.float64)

    # A gradient that is not finite takes no part; of K its row and column may be no number.
    diagonal = tl.where(i == j, K, 0.0)
    norms = tl.sum(diagonal, axis=1)
    finite_i = (norms < SQUARED_NORM_BELOW) & is_row
    finite_j = (tl.sum(diagonal, axis=0) < SQUARED_NORM_BELOW) & is_row
    K = tl.where(finite_i[:, None] & finite_j[None, :], K, 0.0)
    c = tl.load(contrast + group * num_rows + r, mask=is_row, other=0.0)
    c_i = tl.where(finite_i, c, 0.0)
    c_j = tl.where(finite_j, c, 0.0)
    if NEEDS_BOTH_SIGNS:
        highest = tl.zeros((BLOCK_R,), dtype=tl.float64) + tl.max(c_i, axis=0)
        lowest = tl.zeros((BLOCK_R,), dtype=tl.float64) + tl.min(c_i, axis=0)
        c_i = tl.where((highest > 0) & (lowest < 0), c_i, 0.0)
        c_j = tl.where((highest > 0) & (lowest < 0), c_j, 0.0)
    trace = tl.sum(tl.where(finite_i, norms, 0.0), axis=0)
    count = tl.sum(finite_i.to(tl.float64), axis=0)

    dof = trace * 0.0
    has_failed = trace < 0
    if RULE == 0:
        weight = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float64) + c_j[None, :]
    else:
        strength = tl.load(damping) * trace / (tl.maximum(count, 1.0) if RULE == 1 else dim.to(tl.float64))
        # Where the whole system is too small, none of its responses is scored.
        strength_i = tl.zeros((BLOCK_R,), dtype=tl.float64) + strength
        finite_i = finite_i & ((strength_i >= LEAST_DAMPING) | (strength_i <= 0))
        has_direction = strength >= LEAST_DAMPING
        A = K + tl.where(i == j, tl.where(has_direction, strength, 1.0), 0.0)
        is_definite = has_direction
        for k in range(num_rows):
            column = tl.sum(tl.where(j == k, A, 0.0), axis=1)
            pivot_row = tl.sum(tl.where(i == k, A, 0.0), axis=0)
            pivot = tl.sum(tl.where(r == k, pivot_row, 0.0), axis=0)
            is_definite = is_definite & (pivot > 0)
            inverse_pivot = 1.0 / pivot
            scaled = pivot_row * inverse_pivot
            rest = A - column[:, None] * scaled[None, :]
            of_column = tl.where(i == k, inverse_pivot, -column[:, None] * inverse_pivot)
            A = tl.where(j == k, of_column, tl.where(i == k, scaled[None, :], rest))
        B = tl.where(inside, tl.where(is_definite, A, 0.0), 0.0)
        has_failed = has_direction & (is_definite == 0)
        a_j = tl.sum(B * c_i[:, None], axis=0)
        weight = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float64) + a_j[None, :]
        B_ii = tl.sum(tl.where(i == j, B, 0.0), axis=1)
        if EXCLUDE_SELF:
            a_i = tl.sum(B * c_j[None, :], axis=1)
            ratio = tl.where(B_ii > 0, a_i / tl.where(B_ii > 0, B_ii, 1.0), 0.0)
            weight -= ratio[:, None] * B
        dof = tl.where(has_direction, num_rows - strength * tl.sum(B_ii, axis=0), 0.0)
    if EXCLUDE_SELF:
        weight = tl.where(i == j, 0.0, weight)

    system = module.to(tl.int64) * num_groups + group
    note = notes + system * (2 * num_rows + 2)
    tl.store(note + r, tl.sum(weight * K, axis=1), mask=is_row)
    tl.store(note + num_rows + r, finite_i.to(tl.float64), mask=is_row)
    tl.store(note + 2 * num_rows, dof)
    tl.store(note + 2 * num_rows + 1, has_failed.to(tl.float64))
    place = tl.load(local + group * num_rows + r, mask=is_row, other=-1)
    index = tl.load(modules + 4 * module + 2)
    tl.store(is_finite + place * is_finite_stride + index, finite_i.to(tl.uint8), mask=place >= 0)

    weight *= tl.load(scales + module)
    of_place = weights + place * weights_stride + start
    for first in range(0, dim, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        G = tl.load(of_row[:, None] + d[None, :], mask=is_row[:, None] & (d < dim)[None, :], other=0.0)
        G = tl.where(tl.abs(G) < float("inf"), G, 0.0).to(tl.float64)
        M = tl.dot(weight, G, out_dtype=tl.float64)
        at = of_place[:, None] + d[None, :]
        tl.store(at, M.to(weights.dtype.element_ty), mask=(place >= 0)[:, None] & (d < dim)[None, :])


@dataclass(frozen=True, slots=True, eq=False)
class _Modules:
    """A layout's modules class by class, as their gradients lie, on a device."""

    table: Tensor
    """int32 [M, 4]: first number of the gradient, D, index in module order, 0."""
    scales: Tensor
    """float64 [M]."""


_modules: dict[tuple[int, torch.device], tuple[FactorLayout, _Modules]] = {}


def _modules_of(layout: FactorLayout, device: torch.device) -> _Modules:
    # By identity, as comparing two layouts takes longer than a launch; the entry keeps the layout alive.
    key = (id(layout), device)
    if key not in _modules:
        members = [(index, kind) for kind in layout.classes for index in kind.members]
        table = [(layout.places[index].gradient_start, kind.dim, index, 0) for index, kind in members]
        on = _Modules(
            table=on_device(np.array(table, dtype=np.int32), device),
            scales=on_device(np.array([kind.scale for _, kind in members]), device),
        )
        _modules[key] = (layout, on)
    return _modules[key][1]


def solve_groups_into(
    gradients_nD: Tensor,
    rows_NR: Tensor,
    contrast_NR: Tensor,
    local_NR: Tensor,
    layout: FactorLayout,
    weights_lD: Tensor,
    is_finite_lm: Tensor,
    *,
    rule: str,
    damping: Tensor,
    exclude_self: bool,
    needs_both_signs: bool = False,
) -> Tensor:
    """Solve N groups of R <= 64 responses for all M modules; see `influence.weights.solve_groups`.

    `gradients` are float32; `rows` (int64) names each group's rows of them, and `local` (int64) the row
    of `weights` and `is_finite` (bool, modules in module order) that its result goes to, -1 for none.
    With `needs_both_signs` a system whose finite responses have one sign of contrast weighs nothing.
    `rule` is one of RULES, `damping` float64 [1] on the device. Returns notes, float64 [M, N, 2 R + 2],
    modules class by class: each response's total, 1 where its gradient is finite, the effective degrees of
    freedom, and 1 where the system was not positive definite (the weights are zero then).
    """
    device, usable = gradients_nD.device, UsableRange.of(torch.float32, rule)
    modules = _modules_of(layout, device)
    num_modules = len(layout.places)
    num_groups, num_rows = rows_NR.shape
    notes = torch.empty(num_modules, num_groups, 2 * num_rows + 2, dtype=torch.float64, device=device)
    block_r = max(16, triton.next_power_of_2(num_rows))
    _solve_kernel[(num_modules, num_groups)](
        gradients_nD,
        rows_NR,
        contrast_NR,
        local_NR,
        modules.table,
        modules.scales,
        weights_lD,
        notes,
        is_finite_lm.view(torch.uint8),
        gradients_nD.stride(0),
        weights_lD.stride(0),
        is_finite_lm.stride(0),
        num_groups,
        num_rows,
        damping,
        RULE=RULES[rule],
        EXCLUDE_SELF=exclude_self,
        NEEDS_BOTH_SIGNS=needs_both_signs,
        BLOCK_R=block_r,
        BLOCK_D=32 if block_r < 64 else 16,
        SQUARED_NORM_BELOW=usable.squared_norm_below,
        LEAST_DAMPING=usable.least_damping,
        num_warps=block_r // 16 * 2,
    )
    return notes
