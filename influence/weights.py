"""From the gradients of all responses to the matrices that weight each local response's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from influence.config import TracerConfig
from influence.groups import GatheredRows, GroupPlan
from influence.solve import damping_strength, dual_weights, identity_weights, response_gram

INTERPOLATION_TOLERANCE: Final = 0.05
"""A response's total within this fraction of its own contrast counts as interpolated."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupSolution:
    """N groups of R responses, solved for M modules (C of a class; S = R, the response that is scored)."""

    weights: list[Tensor]
    """By class: [C, N, S, D], ``vec(H^-1 d)`` for each scored response, float64."""
    is_finite: Tensor
    """bool [M, N, S]; a response whose gradient is not finite takes no part in that module's system."""
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

    matrices: list[Tensor]
    """M, by class [C, n, D] in float64; zero where not scored."""
    is_finite: list[Tensor]
    """By class, bool [C, n]; True where not scored."""
    total: Tensor
    """[n], see `GroupSolution`."""
    is_scored: list[bool]
    num_floors: Tensor
    """Systems (a module in a group) whose Cholesky factorization failed."""
    num_interpolated: Tensor
    """Groups in which more than half of the modules' systems interpolate."""
    effective_dof: Tensor
    """Summed over the counted groups, the mean over modules."""


def solve_groups(G_by_class: Sequence[Tensor], contrast_NR: Tensor, config: TracerConfig) -> GroupSolution:
    """Solve N groups of equal size for all modules at once; `G_by_class` holds [C, N, R, D] a class."""
    gradients, is_finite = [], []
    for G_CNRD in G_by_class:
        is_finite_CNR = G_CNRD.isfinite().all(-1)
        gradients.append(G_CNRD.to(torch.float64).masked_fill(~is_finite_CNR.unsqueeze(-1), 0.0))
        is_finite.append(is_finite_CNR)
    is_finite_MNR = torch.cat(is_finite)
    K_MNRR = torch.cat([response_gram(G_CNRD) for G_CNRD in gradients])
    # A response whose gradient is dropped has no contrast in that module either.
    contrast_MNR = contrast_NR * is_finite_MNR
    nothing_MN = torch.zeros(K_MNRR.shape[:2], dtype=torch.bool, device=K_MNRR.device)
    if config.hessian == "identity":
        alpha_MNSR = identity_weights(contrast_MNR, config.exclude_self)
        dof_MN, used_floor_MN = nothing_MN.to(torch.float64), nothing_MN
    else:
        dims = [G_CNRD.shape[-1] for G_CNRD in gradients for _ in range(G_CNRD.shape[0])]
        dim_M1 = torch.tensor(dims, dtype=torch.float64, device=K_MNRR.device).unsqueeze(-1)
        num_MN = is_finite_MNR.sum(-1)
        damping_MN = damping_strength(K_MNRR, num_MN, dim_M1, config.damping, config.damping_mode)
        solution = dual_weights(K_MNRR, contrast_MNR, damping_MN, config.exclude_self)
        alpha_MNSR, dof_MN, used_floor_MN = solution.alpha, solution.effective_dof, solution.used_floor
    total_MNS = (alpha_MNSR * K_MNRR).sum(-1)
    may_interpolate = config.hessian != "identity" and not config.exclude_self
    alpha_by_class = torch.split(alpha_MNSR, [G_CNRD.shape[0] for G_CNRD in gradients])
    return GroupSolution(
        weights=[alpha @ G_CNRD for alpha, G_CNRD in zip(alpha_by_class, gradients, strict=True)],
        is_finite=is_finite_MNR,
        total=total_MNS.sum(0),
        is_interpolated=_interpolates(total_MNS, contrast_MNR) if may_interpolate else nothing_MN,
        effective_dof=dof_MN,
        used_floor=used_floor_MN,
    )


def row_weights(
    rows: GatheredRows, plan: GroupPlan, scales: Sequence[float], config: TracerConfig
) -> RowWeights:
    """Solve the plan's groups and keep what scores this rank's rows.

    `scales` holds, by class, the factor of the projections that the captured signs lack.
    """
    gradients, num_local = rows.gradients, len(rows.local)
    device, sizes = gradients[0].device, [G_CND.shape[0] for G_CND in gradients]
    contrast_N = torch.tensor(rows.contrast, dtype=torch.float64, device=device)
    M_by_class = [
        torch.zeros(G_CND.shape[0], num_local, G_CND.shape[2], dtype=torch.float64, device=device)
        for G_CND in gradients
    ]
    is_finite_Mn = torch.ones(sum(sizes), num_local, dtype=torch.bool, device=device)
    total_n = torch.zeros(num_local, dtype=torch.float64, device=device)
    is_scored = [False] * num_local
    num_floors, num_interpolated, effective_dof = torch.zeros(3, dtype=torch.float64, device=device)
    for stack in plan.stacks:
        rows_NR = torch.tensor(stack, device=device)
        solution = solve_groups([G_CND[:, rows_NR] for G_CND in gradients], contrast_N[rows_NR], config)
        n_index, s_index, to_index = torch.tensor(
            [
                (n, s, row - rows.local.start)
                for n, members in enumerate(stack)
                for s, row in enumerate(members)
                if row in rows.local
            ],
            device=device,
        ).unbind(1)
        for M_CnD, weights_CNSD, scale in zip(M_by_class, solution.weights, scales, strict=True):
            M_CnD[:, to_index] = weights_CNSD[:, n_index, s_index] * scale
        is_finite_Mn[:, to_index] = solution.is_finite[:, n_index, s_index]
        total_n[to_index] = solution.total[n_index, s_index]
        for row in to_index.tolist():
            is_scored[row] = True
        is_counted_N = torch.tensor([members[0] in rows.local for members in stack], device=device)
        interpolated_N = solution.is_interpolated.double().mean(0) > 0.5
        num_floors += (solution.used_floor & is_counted_N).sum()
        num_interpolated += (interpolated_N & is_counted_N).sum()
        effective_dof += (solution.effective_dof.mean(0) * is_counted_N).sum()
    return RowWeights(
        matrices=M_by_class,
        is_finite=list(torch.split(is_finite_Mn, sizes)),
        total=total_n,
        is_scored=is_scored,
        num_floors=num_floors,
        num_interpolated=num_interpolated,
        effective_dof=effective_dof,
    )


def _interpolates(total_MNR: Tensor, contrast_MNR: Tensor) -> Tensor:
    has_contrast = contrast_MNR != 0
    is_near = (total_MNR - contrast_MNR).abs() < INTERPOLATION_TOLERANCE * contrast_MNR.abs()
    return (is_near | ~has_contrast).all(-1) & has_contrast.any(-1)
