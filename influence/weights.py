"""From the gradients of all responses to the matrices that weight each local response's tokens.

Everything is batched over the modules and groups, and the host waits once, at the end: at the reference
sizes (6 groups of 16 responses, 196 modules) the numbers are few and launches would be what costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from influence.config import TracerConfig
from influence.groups import GatheredRows, GroupPlan
from influence.interpolation import interpolates, is_mostly_interpolated
from influence.layout import FactorLayout
from influence.solve import damping_strength, dual_weights, identity_weights, response_gram
from influence.staging import to_device
from influence.token_hessian import TokenFactors, solve_token_groups
from influence.usable_range import UsableRange, has_contrast


@dataclass(frozen=True, slots=True, eq=False)
class GroupSolution:
    """N groups of R responses, solved for M modules, class by class (S = R, the response that is scored)."""

    weights: Tensor
    """[N, S, D], laid out as the gradients: ``vec(H^-1 d)`` for each scored response, times the scale of the
    projections that the captured signs lack."""
    is_finite: Tensor
    """bool [M, N, S]: the gradient is in `UsableRange`. Where one is not, the response takes no part in that
    module's system; where a whole system is too small, none of its responses is scored by it."""
    is_scored: Tensor
    """bool [M, N, S]: finite, in a system that has contrast."""
    total: Tensor
    """[N, S], ``sum_m <H_m^-1 d_m, G_sm>``: what the scores of a response's tokens add up to."""
    is_interpolated: Tensor
    """bool [M, N]: every response's total in that module is its own contrast: the fit says nothing new."""
    effective_dof: Tensor
    """[M, N], of the R responses."""
    used_floor: Tensor
    """bool [M, N]."""


@dataclass(frozen=True, slots=True, eq=False)
class RowWeights:
    """How to score this rank's n rows, and what was noticed in the groups that this rank counts."""

    matrices: Tensor
    """M, [n, D] laid out as the gradients and in their type; zero where not scored."""
    is_finite: Tensor
    """bool [n, num_modules], in module order; True where not scored."""
    total: list[float]
    """By row, see `GroupSolution`."""
    is_scored: list[bool]
    """By row. False: its group has no contrast, or no module has a finite gradient of it and, in what is
    finite, contrast."""
    num_dropped: list[int]
    """By module: rows whose gradient there is not finite, or out of `UsableRange`."""
    num_floors: int
    """Systems (a module in a group) whose Cholesky factorization failed."""
    num_interpolated: int
    """Groups in which the modules whose systems interpolate hold more than half of the numbers of a gradient:
    narrow modules are many, and have too few dimensions to interpolate."""
    effective_dof: float
    """Summed over the counted groups, the mean over modules."""


@dataclass(frozen=True, slots=True, eq=False)
class ModuleNumbers:
    """Numbers of the M modules on the device, class by class as the gradients lie."""

    dim: Tensor
    """[M], float64."""
    scale: Tensor
    """[M], float64."""


def solve_groups(
    G_NRD: Tensor,
    contrast_NR: Tensor,
    layout: FactorLayout,
    config: TracerConfig,
    *,
    modules: ModuleNumbers | None = None,
    floor_failures: bool = True,
) -> GroupSolution:
    """Solve N groups of equal size for all modules at once, from their gradients laid out by `layout`.

    `modules` spares the copy of the modules' numbers; for `floor_failures` see `dual_weights`.
    """
    modules = modules or module_numbers(layout, G_NRD.device)
    blocks = [_block(G_NRD, *place) for place in blocks_of_one_dim(layout)]
    K_MNRR = torch.cat([response_gram(G_CNRD) for G_CNRD in blocks])
    usable = UsableRange.of(G_NRD.dtype, config.hessian)
    # Of a gradient that is not finite, the whole row and column of K, and nothing else, may be no number.
    is_finite_MNR = usable.is_usable(K_MNRR.diagonal(dim1=-2, dim2=-1), blocks)
    K_MNRR.masked_fill_(~(is_finite_MNR.unsqueeze(-1) & is_finite_MNR.unsqueeze(-2)), 0.0)
    # A response whose gradient is dropped has no contrast in that module; what is left may have none either.
    contrast_MNR = contrast_NR * is_finite_MNR
    has_contrast_MN1 = has_contrast(contrast_MNR, is_finite_MNR, config).unsqueeze(-1)
    contrast_MNR = contrast_MNR * has_contrast_MN1
    nothing_MN = torch.zeros(K_MNRR.shape[:2], dtype=torch.bool, device=K_MNRR.device)
    if config.hessian == "identity":
        alpha_MNSR = identity_weights(contrast_MNR, config.exclude_self)
        dof_MN, used_floor_MN = nothing_MN.to(torch.float64), nothing_MN
    else:
        damping_MN = damping_strength(
            K_MNRR, is_finite_MNR.sum(-1), modules.dim.unsqueeze(-1), config.damping, config.damping_mode
        )
        is_too_small_MN = usable.is_too_small(damping_MN)
        damping_MN = damping_MN.masked_fill(is_too_small_MN, 0.0)
        is_finite_MNR = is_finite_MNR & ~is_too_small_MN.unsqueeze(-1)
        contrast_MNR = contrast_MNR * is_finite_MNR
        solution = dual_weights(
            K_MNRR, contrast_MNR, damping_MN, config.exclude_self, floor_failures=floor_failures
        )
        alpha_MNSR, dof_MN, used_floor_MN = solution.alpha, solution.effective_dof, solution.used_floor
    total_MNS = (alpha_MNSR * K_MNRR).sum(-1)
    may_interpolate = config.hessian != "identity" and not config.exclude_self
    return GroupSolution(
        weights=_weighted_sums(blocks, alpha_MNSR * modules.scale[:, None, None, None], G_NRD.dtype),
        is_finite=is_finite_MNR,
        is_scored=is_finite_MNR & has_contrast_MN1,
        total=total_MNS.sum(0),
        is_interpolated=interpolates(total_MNS, contrast_MNR) if may_interpolate else nothing_MN,
        effective_dof=dof_MN,
        used_floor=used_floor_MN,
    )


def row_weights(
    rows: GatheredRows,
    plan: GroupPlan,
    layout: FactorLayout,
    config: TracerConfig,
    factors: TokenFactors | None = None,
) -> RowWeights:
    """Solve the plan's groups and keep what scores this rank's rows. The host waits once, for the counts.

    `factors` are needed for ``hessian=token`` alone, which makes the host wait more often.
    """
    if config.hessian == "token":
        if factors is None:
            raise ValueError("hessian=token needs the captured factors")
        return _token_weights(rows, plan, layout, config, factors)
    weights, has_failed = _row_weights(rows, plan, layout, config, floor_failures=False)
    if has_failed:
        weights, _ = _row_weights(rows, plan, layout, config, floor_failures=True)
    return weights


def _token_weights(
    rows: GatheredRows, plan: GroupPlan, layout: FactorLayout, config: TracerConfig, factors: TokenFactors
) -> RowWeights:
    solution = solve_token_groups(rows, plan, layout, config, factors)
    is_scored = dict.fromkeys(rows.local, False)
    in_group = {row for group in plan.scored_groups for row in group}
    has_group = [row in in_group for row in rows.local]
    for group in plan.scored_groups:
        is_finite_MR = solution.is_finite[group].T
        contrast_R = torch.tensor([rows.contrast[row] for row in group], device=is_finite_MR.device)
        has_contrast_M = has_contrast(contrast_R * is_finite_MR, is_finite_MR, config)
        is_scored_R = (is_finite_MR & has_contrast_M.unsqueeze(-1)).any(0).tolist()
        is_scored.update(
            {row: scored for row, scored in zip(group, is_scored_R, strict=True) if row in is_scored}
        )
    is_finite_nM = solution.is_finite[rows.local.start : rows.local.stop]
    (unscored,) = to_device([[not has for has in has_group]], is_finite_nM.device)
    is_finite_nM = is_finite_nM | (unscored != 0).unsqueeze(1)
    return RowWeights(
        matrices=solution.weights,
        is_finite=is_finite_nM,
        total=solution.total.tolist(),
        is_scored=[is_scored[row] for row in rows.local],
        num_dropped=(~is_finite_nM).sum(0).tolist(),
        num_floors=solution.num_floors,
        num_interpolated=0,
        effective_dof=0.0,
    )


def module_numbers(layout: FactorLayout, device: torch.device) -> ModuleNumbers:
    return ModuleNumbers(*to_device(_module_columns(layout), device))


def _module_columns(layout: FactorLayout) -> list[list[float]]:
    return [
        [float(kind.dim) for kind in layout.classes for _ in kind.members],
        [kind.scale for kind in layout.classes for _ in kind.members],
    ]


def _row_weights(
    rows: GatheredRows, plan: GroupPlan, layout: FactorLayout, config: TracerConfig, *, floor_failures: bool
) -> tuple[RowWeights, bool]:
    """The weights, and whether a system failed (which they need not show, with `floor_failures` off)."""
    num_local, num_modules, device = len(rows.local), len(layout.places), rows.gradients.device
    module_order = np.argsort([index for kind in layout.classes for index in kind.members])
    stacks = [GroupStack.of(stack, rows) for stack in plan.stacks]
    columns: list[ArrayLike] = [module_order, *_module_columns(layout)]
    for stack in stacks:
        columns += [stack.rows, stack.contrast, stack.places, stack.local_rows]
    order_M, dim_M, scale_M, *staged = to_device(columns, device)
    modules = ModuleNumbers(dim_M, scale_M)

    M_nD = rows.gradients.new_zeros(num_local, layout.gradient_dim)
    is_finite_nM = torch.ones(num_local, num_modules, dtype=torch.bool, device=device)
    noticed: list[Tensor] = []
    for index in range(len(stacks)):
        rows_NR, contrast_NR, places_L, local_L = staged[4 * index : 4 * index + 4]
        solution = solve_groups(
            rows.gradients[rows_NR],
            contrast_NR,
            layout,
            config,
            modules=modules,
            floor_failures=floor_failures,
        )
        M_nD[local_L] = solution.weights.flatten(0, 1)[places_L]
        is_finite_nM[local_L] = solution.is_finite[order_M].flatten(1).T[places_L]
        interpolated_dim_MN = solution.is_interpolated * dim_M.unsqueeze(1)
        of_modules = (solution.used_floor, interpolated_dim_MN, solution.effective_dof)
        noticed += [column_MN.sum(0, dtype=torch.float64) for column_MN in of_modules]
        noticed.append(solution.is_scored.sum(0, dtype=torch.float64).flatten())
        noticed.append(solution.total.flatten())

    # Sums over modules and rows, read at once and made sense of by the host: launches cost more than numbers.
    read = iter(np.split(*_on_host([is_finite_nM.sum(0, dtype=torch.float64), *noticed])))
    num_finite_M = next(read)
    total_n, is_scored_n = np.zeros(num_local), np.zeros(num_local, dtype=np.bool_)
    num_floors = num_interpolated = effective_dof = 0.0
    has_failed = False
    for stack in stacks:
        floors_N, interpolated_dim_N, dof_N, num_scored_NS, total_NS = (next(read) for _ in range(5))
        local, places = stack.local_rows, stack.places
        total_n[local], is_scored_n[local] = total_NS[places], num_scored_NS[places] > 0
        has_failed |= bool(floors_N.any())
        num_floors += floors_N[stack.is_counted].sum()
        num_interpolated += is_mostly_interpolated(interpolated_dim_N[stack.is_counted], layout).sum()
        effective_dof += dof_N[stack.is_counted].sum() / num_modules
    return RowWeights(
        matrices=M_nD,
        is_finite=is_finite_nM,
        total=total_n.tolist(),
        is_scored=is_scored_n.tolist(),
        num_dropped=[num_local - int(count) for count in num_finite_M],
        num_floors=int(num_floors),
        num_interpolated=int(num_interpolated),
        effective_dof=float(effective_dof),
    ), has_failed


@dataclass(frozen=True, slots=True, eq=False)
class GroupStack:
    """N groups of R responses each."""

    rows: NDArray[np.int64]
    """[N, R], among those of all ranks."""
    contrast: NDArray[np.float64]
    """[N, R]."""
    local: NDArray[np.int64]
    """[N, R], among this rank's; -1 for another rank's."""

    @classmethod
    def of(cls, groups: Sequence[Sequence[int]], rows: GatheredRows) -> GroupStack:
        members = np.asarray(groups, dtype=np.int64)
        is_local = (members >= rows.local.start) & (members < rows.local.stop)
        contrast = np.asarray(rows.contrast, dtype=np.float64)[members]
        return cls(members, contrast, np.where(is_local, members - rows.local.start, -1))

    @property
    def is_counted(self) -> NDArray[np.bool_]:
        """[N]: this rank has the group's first row."""
        is_counted: NDArray[np.bool_] = self.local[:, 0] >= 0
        return is_counted

    @property
    def places(self) -> NDArray[np.int64]:
        """[L]: where the L local rows lie among the N R."""
        return np.flatnonzero(self.local >= 0)

    @property
    def local_rows(self) -> NDArray[np.int64]:
        """[L]: the same rows among this rank's."""
        return self.local.reshape(-1)[self.places]


def _on_host(parts: Sequence[Tensor]) -> tuple[NDArray[np.float64], list[int]]:
    """Vectors put together in one copy, for which the host waits, and where each but the first starts."""
    starts = np.cumsum([part.numel() for part in parts])[:-1].tolist()
    return np.asarray(torch.cat(list(parts)).tolist(), dtype=np.float64), starts


def blocks_of_one_dim(layout: FactorLayout) -> list[tuple[int, int, int]]:
    """(first number, number of modules, D of each) of modules side by side whose gradients are as large.

    Systems do not ask for the shape of a gradient, so neighbouring classes such as gate and down go together.
    """
    blocks: list[tuple[int, int, int]] = []
    for kind in layout.classes:
        if blocks and blocks[-1][2] == kind.dim:
            start, count, dim = blocks.pop()
            blocks.append((start, count + len(kind.members), dim))
        else:
            blocks.append((kind.gradient_start, len(kind.members), kind.dim))
    return blocks


def _block(G_NRD: Tensor, start: int, count: int, dim: int) -> Tensor:
    """The gradients of a block's modules in float64, [C, N, R, D_block], in one copy."""
    part_CNRD = _modules(G_NRD, start, count, dim).permute(2, 0, 1, 3)
    return torch.empty(part_CNRD.shape, dtype=torch.float64, device=G_NRD.device).copy_(part_CNRD)


def _modules(gradients: Tensor, start: int, count: int, dim: int) -> Tensor:
    """A view [..., C, D_block]."""
    return gradients[..., start : start + count * dim].view(*gradients.shape[:-1], count, dim)


def _weighted_sums(blocks: Sequence[Tensor], alpha_MNSR: Tensor, dtype: torch.dtype) -> Tensor:
    """``sum_r alpha_sr G_r`` of every module, [N, S, D] in `dtype`; what is not finite weighs nothing."""
    _, num_groups, num_rows, _ = alpha_MNSR.shape
    width = sum(G_CNRD.shape[0] * G_CNRD.shape[3] for G_CNRD in blocks)
    weights_NSD = torch.empty(num_groups, num_rows, width, dtype=dtype, device=alpha_MNSR.device)
    alphas = torch.split(alpha_MNSR, [G_CNRD.shape[0] for G_CNRD in blocks])
    start = 0
    for alpha_CNSR, G_CNRD in zip(alphas, blocks, strict=True):
        count, dim = G_CNRD.shape[0], G_CNRD.shape[3]
        sums_CNSD = alpha_CNSR @ G_CNRD.nan_to_num_(0.0, 0.0, 0.0)
        _modules(weights_NSD, start, count, dim).copy_(sums_CNSD.permute(1, 2, 0, 3))
        start += count * dim
    return weights_NSD
