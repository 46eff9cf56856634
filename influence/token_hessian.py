"""Weights for ``hessian=token``, the curvature of positions: ``H = sum_t vec(g_t) vec(g_t)^T + lambda I``.

There are more positions than dimensions, so this is solved in the D x D space: for every module one
factorization a group (one a response where the response itself is left out) with one right-hand side, the
direction ``d = sum_r c_r G_r``. Never a solve a token: ``s_t = <H^-1 d, g_t>``.

Everything is float64. A position's gradient is the outer product of its factors, so that
``sum_t vec(g_t) vec(g_t)^T = Z Z^T`` with the column-wise Kronecker (Khatri-Rao) product Z = U (*) V: plain
matrix products over stretches of tokens. Modules are taken in batches, so that memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from influence.config import TracerConfig
from influence.groups import GatheredRows, GroupPlan
from influence.layout import FactorLayout, ShapeClass
from influence.micro_batch import MicroBatch
from influence.solve import floored_inverse
from influence.usable_range import UsableRange, has_contrast

MATRIX_BYTES: Final = 2**30
"""About what the D x D matrices of a batch of modules may take; a single module's are formed in any case."""
PRODUCT_BYTES: Final = 2**28
"""The most that Z of a stretch of tokens may take."""


@dataclass(frozen=True, slots=True, eq=False)
class CapturedRow:
    """The captured factors of one response."""

    factors: Sequence[Tensor]
    """[F, T]; with more than one, each holds other calls of the modules, whose gradients add up."""
    gradient_scale: float = 1.0
    """What the captured gradients are multiplied by to be the objective's."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenFactors:
    """The factors of this rank's rows, and whom it shares groups with."""

    rows: Sequence[CapturedRow]
    process_group: dist.ProcessGroup | None = None

    @classmethod
    def of_micro_batches(
        cls,
        batches: Sequence[MicroBatch],
        place_of: NDArray[np.int64],
        process_group: dist.ProcessGroup | None,
    ) -> TokenFactors:
        """Views of what was captured; `place_of` has a row's index among this rank's, batch by batch."""
        captured = []
        for batch in batches:
            scales = [1.0] * len(batch.selection.row_ids)
            if batch.gradient_scale is not None:
                scales = batch.gradient_scale.tolist()
            for (first, end), scale in zip(batch.selection.row_slots.tolist(), scales, strict=True):
                captured.append(CapturedRow([part[:, first:end] for part in batch.factors], scale))
        return cls([captured[index] for index in np.argsort(place_of)], process_group)


@dataclass(frozen=True, slots=True, eq=False)
class TokenSolution:
    """What scores this rank's n rows."""

    weights: Tensor
    """[n, D] laid out as the gradients and in their type, times the scale of the projections."""
    is_finite: Tensor
    """bool [N, M], of all rows of all ranks, in module order."""
    total: Tensor
    """float64 [n]."""
    num_floors: int
    """Systems whose Cholesky factorization failed; a group's is counted by the rank of its first row."""


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Neighbouring modules of one shape (B of them)."""

    kind: ShapeClass
    places: range
    """Among the members of `kind`."""
    u_rows: Tensor
    """int64 [B k_out], rows of the factors."""
    v_rows: Tensor
    """int64 [B k_in]."""

    def of(self, gradients: Tensor) -> Tensor:
        """A view [..., B, D] of what is laid out as the gradients."""
        return self.kind.of(gradients)[..., self.places.start : self.places.stop, :]


def solve_token_groups(
    rows: GatheredRows, plan: GroupPlan, layout: FactorLayout, config: TracerConfig, factors: TokenFactors
) -> TokenSolution:
    """Solve the groups that this rank has a row of; collective where groups span ranks.

    With ``exclude_self`` response r gets ``(H - H_r + lambda I)^-1 (d - c_r G_r)``, H_r being the sum over
    its own positions; lambda stays the whole group's. A response whose gradient in a module is not finite
    (see `UsableRange`) takes no part in that module's system.
    """
    device, usable = rows.gradients.device, UsableRange.of(rows.gradients.dtype, "token")
    weights_nD = rows.gradients.new_zeros(len(rows.local), layout.gradient_dim)
    total_n = torch.zeros(len(rows.local), dtype=torch.float64, device=device)
    is_finite_NM = torch.ones(len(rows.groups), len(layout.places), dtype=torch.bool, device=device)
    num_floors = 0
    for batch in _batches(layout, device):
        G_NBD = batch.of(rows.gradients)
        is_finite_NB = usable.is_usable(G_NBD.to(torch.float64).square().sum(-1), [G_NBD])
        members = torch.tensor([batch.kind.members[place] for place in batch.places], device=device)
        is_finite_NM[:, members] = is_finite_NB
        for group in plan.scored_groups:
            solver = _GroupSolver(batch, group, rows, is_finite_NB[group], config, factors, usable)
            if not solver.takes_part:
                continue
            for row, x_BD, num_floored in solver.solve():
                n = row - rows.local.start
                batch.of(weights_nD)[n] = (x_BD * batch.kind.scale).to(weights_nD.dtype)
                total_n[n] += (x_BD * solver.gradient(row)).sum()
                num_floors += num_floored
            if solver.is_too_small_B is not None:
                group_R1 = torch.tensor(group, device=device).unsqueeze(1)
                is_finite_NM[group_R1, members] &= ~solver.is_too_small_B
    return TokenSolution(weights_nD, is_finite_NM, total_n, num_floors)


class _GroupSolver:
    """The systems of one group in one batch of modules."""

    def __init__(
        self,
        batch: _Batch,
        group: Sequence[int],
        rows: GatheredRows,
        is_finite_RB: Tensor,
        config: TracerConfig,
        factors: TokenFactors,
        usable: UsableRange,
    ) -> None:
        self._batch = batch
        self._usable = usable
        self._group = group
        self._local = [row for row in group if row in rows.local]
        self._first_local = rows.local.start
        self._spans_ranks = (
            len({rank for rank, part in enumerate(rows.ranks) for row in group if row in part}) > 1
        )
        self._is_finite_RB = is_finite_RB
        self._config = config
        self._factors = factors
        self._rows = rows
        self.is_too_small_B: Tensor | None = None
        """Which systems have too small a lambda to be solved; known once they were."""

    @property
    def takes_part(self) -> bool:
        """Whether this rank has a row of the group, or others wait for it."""
        return bool(self._local) or self._spans_ranks

    def gradient(self, row: int) -> Tensor:
        """G of a row, float64 [B, D]; zero where it is not finite."""
        place = self._group.index(row)
        G_BD = self._batch.of(self._rows.gradients)[row].to(torch.float64)
        return torch.where(self._is_finite_RB[place].unsqueeze(-1), G_BD, 0.0)

    def solve(self) -> Iterator[tuple[int, Tensor, int]]:
        """For each local row: its index, ``H^-1 d`` as [B, D], and how many systems needed a floor."""
        dim, device = self._batch.kind.dim, self._rows.gradients.device
        num_modules = len(self._batch.places)
        room = kept_matrices(num_modules, dim)
        H_BDD = torch.zeros(num_modules, dim, dim, dtype=torch.float64, device=device)
        kept: dict[int, Tensor] = {}
        for row in self._local:
            if self._config.exclude_self:
                own_BDD = self._outer_products(row)
                H_BDD += own_BDD
                if len(kept) < room:
                    kept[row] = own_BDD
            else:
                self._add_outer_products(H_BDD, row)
        if self._spans_ranks:
            dist.all_reduce(H_BDD, group=self._factors.process_group)
        if not self._local:
            return
        G_RBD = torch.stack([self.gradient(row) for row in self._group])
        contrast = [self._rows.contrast[row] for row in self._group]
        contrast_BR = torch.tensor(contrast, dtype=torch.float64, device=device) * self._is_finite_RB.T
        contrast_BR *= has_contrast(contrast_BR, self._is_finite_RB.T, self._config).unsqueeze(-1)
        d_BD = torch.einsum("br,rbd->bd", contrast_BR, G_RBD)
        damping_B = self._damping(H_BDD, G_RBD)
        self.is_too_small_B = self._usable.is_too_small(damping_B)
        damping_B = damping_B.masked_fill(self.is_too_small_B, 0.0)
        if not self._config.exclude_self:
            x_BD, num_floored = _solve(H_BDD, damping_B, d_BD)
            is_counted = self._group[0] in self._rows.local
            for row in self._local:
                yield row, x_BD, num_floored if is_counted and row == self._local[0] else 0
            return
        for row in self._local:
            own_BDD = kept.pop(row) if row in kept else self._outer_products(row)
            place = self._group.index(row)
            rest_BD = d_BD - contrast_BR[:, place, None] * G_RBD[place]
            yield row, *_solve(H_BDD - own_BDD, damping_B, rest_BD)

    def _damping(self, H_BDD: Tensor, G_RBD: Tensor) -> Tensor:
        config, num_rows_B = self._config, self._is_finite_RB.sum(0)
        if config.damping_mode == "trace_over_dim":
            return config.damping * H_BDD.diagonal(dim1=-2, dim2=-1).mean(-1)
        return config.damping * G_RBD.square().sum((0, 2)) / num_rows_B.clamp(min=1)

    def _outer_products(self, row: int) -> Tensor:
        """``H_r = sum_t vec(g_t) vec(g_t)^T`` over the positions of a local row, [B, D, D]."""
        dim, num_modules = self._batch.kind.dim, len(self._batch.places)
        H_BDD = torch.zeros(num_modules, dim, dim, dtype=torch.float64, device=self._rows.gradients.device)
        self._add_outer_products(H_BDD, row)
        return H_BDD

    def _add_outer_products(self, H_BDD: Tensor, row: int) -> None:
        batch, captured = self._batch, self._factors.rows[row - self._first_local]
        k_out, k_in, num_modules = batch.kind.k_out, batch.kind.k_in, len(batch.places)
        is_finite_B11 = self._is_finite_RB[self._group.index(row)].view(-1, 1, 1)
        scale = batch.kind.scale * captured.gradient_scale
        num_tokens = captured.factors[0].shape[1]
        stretch = max(1, PRODUCT_BYTES // (8 * num_modules * batch.kind.dim))
        for start in range(0, num_tokens, stretch):
            Z_BDT = None
            for factors_FT in captured.factors:
                part_FT = factors_FT[:, start : start + stretch]
                u_BOT = part_FT[batch.u_rows].to(torch.float64).view(num_modules, k_out, -1)
                v_BIT = part_FT[batch.v_rows].to(torch.float64).view(num_modules, k_in, -1)
                u_BOT = torch.where(is_finite_B11, u_BOT, 0.0).mul_(scale)
                v_BIT = torch.where(is_finite_B11, v_BIT, 0.0)
                product = (u_BOT.unsqueeze(2) * v_BIT.unsqueeze(1)).view(num_modules, batch.kind.dim, -1)
                Z_BDT = product if Z_BDT is None else Z_BDT.add_(product)
            assert Z_BDT is not None  # noqa: S101  (a row has factors)
            H_BDD.baddbmm_(Z_BDT, Z_BDT.mT)


def modules_a_batch(kind: ShapeClass) -> int:
    """B, for D x D matrices of four kinds: H, H less the response's own, that with damping, and a factor."""
    return min(len(kind.members), max(1, MATRIX_BYTES // (8 * 4 * kind.dim**2)))


def kept_matrices(num_modules: int, dim: int) -> int:
    """How many responses' own H_r are kept in a batch of modules rather than formed twice."""
    return MATRIX_BYTES // (8 * num_modules * dim * dim)


def _batches(layout: FactorLayout, device: torch.device) -> Iterator[_Batch]:
    for kind in layout.classes:
        size = modules_a_batch(kind)
        for first in range(0, len(kind.members), size):
            places = range(first, min(first + size, len(kind.members)))
            modules = [layout.places[kind.members[place]] for place in places]
            u_rows = [row for m in modules for row in range(m.u_row, m.u_row + m.k_out)]
            v_rows = [row for m in modules for row in range(m.v_row, m.v_row + m.k_in)]
            yield _Batch(
                kind, places, torch.tensor(u_rows, device=device), torch.tensor(v_rows, device=device)
            )


def _solve(H_BDD: Tensor, damping_B: Tensor, d_BD: Tensor) -> tuple[Tensor, int]:
    """``(H + lambda I)^-1 d`` [B, D], and how many Cholesky factorizations failed.

    Where they fail, eigenvalues are raised to ``D eps`` of the largest. Where lambda is 0 there is no
    gradient and no direction, and the solution is zero.
    """
    is_zero_B = damping_B <= 0
    damped_BDD = H_BDD.clone()
    damped_BDD.diagonal(dim1=-2, dim2=-1).add_(torch.where(is_zero_B, 1.0, damping_B).unsqueeze(-1))
    factor_BDD, info_B = torch.linalg.cholesky_ex(damped_BDD)
    x_BD = torch.cholesky_solve(d_BD.unsqueeze(-1), factor_BDD).squeeze(-1)
    failed_B = (info_B != 0) & ~is_zero_B
    num_failed = int(failed_B.sum())
    if num_failed:
        x_BD[failed_B] = (floored_inverse(damped_BDD[failed_B]) @ d_BD[failed_B].unsqueeze(-1)).squeeze(-1)
    return torch.where(is_zero_B.unsqueeze(-1), 0.0, x_BD), num_failed
