"""Captured factors that no model made: random numbers where a capture would have put its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence import InfluenceTracer, kernels
from influence.layout import FactorLayout
from influence.micro_batch import MicroBatch
from influence.selection import select_tokens

ROWS_IN_MICRO_BATCH = 2


def captured_rows(
    layout: FactorLayout, lengths: Sequence[int], rows: Sequence[int], device: torch.device
) -> list[MicroBatch]:
    """Micro-batches with `rows`, of `lengths[row]` tokens, two at a time, in bfloat16.

    A row's numbers depend on its id alone, so that they are the same on whichever rank it lies.
    """
    return [
        _micro_batch(layout, lengths, rows[start : start + ROWS_IN_MICRO_BATCH], device)
        for start in range(0, len(rows), ROWS_IN_MICRO_BATCH)
    ]


def layout_of(tracer: InfluenceTracer) -> FactorLayout:
    """Where the tracer wants the numbers of each layer."""
    return tracer._capture.layout


def put(tracer: InfluenceTracer, batches: Sequence[MicroBatch]) -> None:
    """Let the tracer believe that it captured these."""
    tracer._capture.micro_batches = list(batches)


def _micro_batch(
    layout: FactorLayout, lengths: Sequence[int], rows: Sequence[int], device: torch.device
) -> MicroBatch:
    row_ids = torch.repeat_interleave(torch.tensor(rows), torch.tensor([lengths[row] for row in rows]))
    selection = select_tokens(row_ids[None])
    shape = (layout.num_factors, selection.num_slots)
    factors = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    for row, (first, end) in zip(selection.row_ids, selection.row_slots.tolist(), strict=True):
        generator = torch.Generator(device).manual_seed(row)
        factors[:, first:end] = torch.randn(
            layout.num_factors, end - first, dtype=torch.bfloat16, device=device, generator=generator
        )
    gradients = torch.empty(len(rows), layout.gradient_dim, device=device)
    kernels.response_gradients(factors, selection.row_slots.tolist(), layout, gradients)
    return MicroBatch(selection, (factors,), gradients, None)


@dataclass(frozen=True, slots=True)
class Reference:
    """Scores of a group's rows straight from the definition, in float64.

    With hessian=response, damping relative to tr(K)/R, and the scored response left out: no Gram matrix of
    the whole group, no update of an inverse, and where D is small no Gram matrix at all.
    """

    layout: FactorLayout
    factors: dict[int, Tensor]
    """By row: [F, tokens], its factors, on the device that computes."""
    contrast: dict[int, float]
    damping: float

    @classmethod
    def of_group(
        cls,
        layout: FactorLayout,
        batches: Sequence[MicroBatch],
        contrast: dict[int, float],
        damping: float,
        device: torch.device,
    ) -> Reference:
        factors = {
            row: batch.factors[0][:, first:end].to(device)
            for batch in batches
            for row, (first, end) in zip(
                batch.selection.row_ids, batch.selection.row_slots.tolist(), strict=True
            )
            if row in contrast
        }
        return cls(layout, factors, contrast, damping)

    def scores(self, rows: Sequence[int]) -> dict[int, Tensor]:
        """float64 [tokens] on the CPU, for some rows of the group."""
        sums = {
            row: torch.zeros(self.factors[row].shape[1], dtype=torch.float64, device=self.factors[row].device)
            for row in rows
        }
        for module, place in enumerate(self.layout.places):
            gradients = {row: self._gradient(row, module) for row in self.contrast}
            norms = [float(g @ g) for g in gradients.values()]
            strength = self.damping * sum(norms) / len(norms)
            for row in rows:
                others = [other for other in gradients if other != row]
                G_RD = torch.stack([gradients[other] for other in others])
                c_R = torch.tensor([self.contrast[other] for other in others]).to(G_RD)
                M = _preconditioned(G_RD, c_R, strength).view(place.k_out, place.k_in) * place.scale
                u, v = self._factors(row, module)
                sums[row] = sums[row] + ((M.T @ u) * v).sum(0)
        return {row: total.cpu() for row, total in sums.items()}

    def _factors(self, row: int, module: int) -> tuple[Tensor, Tensor]:
        factors = self.factors[row]
        return self.layout.u(factors, module).double(), self.layout.v(factors, module).double()

    def _gradient(self, row: int, module: int) -> Tensor:
        u, v = self._factors(row, module)
        return (u @ v.T).flatten() * self.layout.places[module].scale


def _preconditioned(G_RD: Tensor, c_R: Tensor, strength: float) -> Tensor:
    """``H^-1 d``: in R^D where D is small, by the responses' Gram matrix where it is not."""
    num_rows, dim = G_RD.shape
    if dim <= 256:
        eye = torch.eye(dim, dtype=G_RD.dtype, device=G_RD.device)
        return torch.linalg.solve(G_RD.T @ G_RD + strength * eye, G_RD.T @ c_R)
    eye = torch.eye(num_rows, dtype=G_RD.dtype, device=G_RD.device)
    return G_RD.T @ torch.linalg.solve(G_RD @ G_RD.T + strength * eye, c_R)
