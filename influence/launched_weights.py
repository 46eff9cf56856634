"""The weights of a step's rows, launched on the device, and what was noticed about them, read later.

The scores need M alone. So where a GPU solves the groups (`influence.kernels.gpu.group_solve`), scoring can
be launched right behind the solve, and the host reads the solve's numbers while the device is at work on the
scores. Everywhere else `influence.weights.row_weights` does it all at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from influence import kernels
from influence.config import TracerConfig
from influence.groups import GatheredRows, GroupPlan
from influence.interpolation import interpolates, is_mostly_interpolated
from influence.layout import FactorLayout
from influence.staging import HostCopy, to_device
from influence.token_hessian import TokenFactors
from influence.usable_range import has_contrast
from influence.weights import GroupStack, RowWeights, row_weights


class LaunchedWeights:
    """What scores this rank's rows, perhaps still being computed."""

    matrices: Tensor
    """See `RowWeights`."""
    is_finite: Tensor

    def __init__(self, matrices: Tensor, is_finite: Tensor) -> None:
        self.matrices, self.is_finite = matrices, is_finite

    def finish(self) -> RowWeights:
        """Wait for the solve, not for what was launched after it.

        Where a system turned out not to be positive definite, all are solved anew, and what comes back has
        other matrices than were launched.
        """
        raise NotImplementedError


class _Known(LaunchedWeights):
    def __init__(self, weights: RowWeights) -> None:
        super().__init__(weights.matrices, weights.is_finite)
        self._weights = weights

    def finish(self) -> RowWeights:
        return self._weights


class _OnDevice(LaunchedWeights):
    def __init__(
        self, rows: GatheredRows, plan: GroupPlan, layout: FactorLayout, config: TracerConfig
    ) -> None:
        from influence.kernels.gpu.group_solve import solve_groups_into

        self._rows, self._plan, self._layout, self._config = rows, plan, layout, config
        num_local, gradients_ND = len(rows.local), rows.gradients
        weights_nD = gradients_ND.new_zeros(num_local, layout.gradient_dim)
        is_finite_nM = gradients_ND.new_ones((num_local, len(layout.places)), dtype=torch.bool)
        super().__init__(weights_nD, is_finite_nM)
        stacks = [GroupStack.of(stack, rows) for stack in plan.stacks]
        columns: list[NDArray[Any]] = [np.array([config.damping])]
        for groups in stacks:
            columns += [groups.rows, groups.contrast, groups.local]
        damping, *staged = to_device(columns, gradients_ND.device)
        self._solved: list[tuple[GroupStack, HostCopy]] = []
        for index, groups in enumerate(stacks):
            rows_NR, contrast_NR, local_NR = staged[3 * index : 3 * index + 3]
            notes = solve_groups_into(
                gradients_ND,
                rows_NR,
                contrast_NR,
                local_NR,
                layout,
                weights_nD,
                is_finite_nM,
                rule="identity" if config.hessian == "identity" else config.damping_mode,
                damping=damping,
                exclude_self=config.exclude_self,
                needs_both_signs=config.contrast == "accepted_minus_rejected",
            )
            self._solved.append((groups, HostCopy(notes)))

    def finish(self) -> RowWeights:
        num_local, num_modules = len(self._rows.local), len(self._layout.places)
        total_n = np.zeros(num_local)
        is_finite_nM = np.ones((num_local, num_modules), dtype=np.bool_)
        is_scored_n = np.zeros(num_local, dtype=np.bool_)
        module_order = np.array([index for kind in self._layout.classes for index in kind.members])
        dim_M = np.array([float(self._layout.places[index].dim) for index in module_order])
        num_interpolated, effective_dof = 0, 0.0
        for groups, copy in self._solved:
            copy.wait()
            notes, num_rows = copy.tensor.numpy(), groups.rows.shape[1]
            if notes[..., -1].any():
                return row_weights(self._rows, self._plan, self._layout, self._config)
            total_MNR, is_finite_MNR = notes[..., :num_rows], notes[..., num_rows : 2 * num_rows] > 0
            is_local = groups.local >= 0
            place = groups.local[is_local]
            total_n[place] = total_MNR.sum(0)[is_local]
            is_finite_nM[place[:, None], module_order] = is_finite_MNR[:, is_local].T
            contrast_MNR = groups.contrast * is_finite_MNR
            has_contrast_MN = has_contrast(contrast_MNR, is_finite_MNR, self._config)
            is_scored_n[place] = (is_finite_MNR & has_contrast_MN[..., None]).any(0)[is_local]
            effective_dof += float(notes[..., -2].mean(0)[groups.is_counted].sum())
            if self._config.hessian != "identity" and not self._config.exclude_self:
                interpolates_MN = interpolates(total_MNR, contrast_MNR)
                interpolated_dim_N = dim_M @ interpolates_MN[:, groups.is_counted]
                num_interpolated += int(is_mostly_interpolated(interpolated_dim_N, self._layout).sum())
        return RowWeights(
            matrices=self.matrices,
            is_finite=self.is_finite,
            total=total_n.tolist(),
            is_scored=is_scored_n.tolist(),
            num_dropped=(~is_finite_nM).sum(0).tolist(),
            num_floors=0,
            num_interpolated=num_interpolated,
            effective_dof=effective_dof,
        )


def launch_row_weights(
    rows: GatheredRows,
    plan: GroupPlan,
    layout: FactorLayout,
    config: TracerConfig,
    factors: TokenFactors | None = None,
) -> LaunchedWeights:
    """As `row_weights`, without waiting where the device can solve the groups by itself."""
    most_rows = max((len(stack[0]) for stack in plan.stacks), default=0)
    if config.hessian != "token" and kernels.solves_groups(rows.gradients, most_rows):
        return _OnDevice(rows, plan, layout, config)
    return _Known(row_weights(rows, plan, layout, config, factors))
