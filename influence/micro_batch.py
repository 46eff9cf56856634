"""What is recorded of a micro-batch: its factors, filled row by row, and what they add up to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from influence import kernels
from influence.kernels import on_device
from influence.layout import FactorLayout
from influence.selection import TokenSelection


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """The captured tokens of one ``capture()`` and what was recorded of them."""

    selection: TokenSelection
    factors: tuple[Tensor, ...]
    """One ``[F, W]``; further ones hold second and later calls of a module in the same forward."""
    gradients: Tensor
    """[R, D]: G of the R responses, in float32 (float64 for a float64 model)."""
    gradient_scale: Tensor | None
    """float64 [R], CPU: what a row's captured gradients were multiplied by in `gradients`, or 1."""


def storage_dtype(computed: torch.dtype) -> torch.dtype:
    """The type in which projected inputs and gradients are kept, given what a layer computes in.

    bfloat16 stays, and so does float64; everything else (float16 could overflow in a sum over a
    layer's width) is kept in float32.
    """
    return computed if computed in (torch.bfloat16, torch.float64) else torch.float32


def response_dtype(weights: torch.dtype) -> torch.dtype:
    """The type of ``G_r`` and of the scores: float32, for a float64 model float64."""
    return torch.float64 if weights == torch.float64 else torch.float32


class FactorStore:
    """The factors of one micro-batch while they arrive; allocated when the first does.

    The first call of a module fills its rows of the first tensor, a second call those of a second. A
    call whose gradient does not arrive leaves nothing behind.
    """

    def __init__(
        self, selection: TokenSelection, layout: FactorLayout, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.selection = selection
        self.layout = layout
        self.device = device
        self.dtype = dtype
        self.factors: list[Tensor] = []
        self._has_gradient: list[set[int]] = []
        self._num_calls = [0] * len(layout.places)
        self._source_W = on_device(selection.source, device)

    def next_call(self, module: int) -> int:
        """The index of the factors whose rows of v the module's next call may fill."""
        return self._num_calls[module]

    def take(self, module: int) -> int:
        """Give those rows to the call that is next."""
        self._num_calls[module] += 1
        return self._num_calls[module] - 1

    def add_inputs(self, values: Tensor, signs_KX: Tensor, modules: range, call: int) -> None:
        """Project the input that neighbouring modules share to their rows of v."""
        first, last = self.layout.places[modules.start], self.layout.places[modules[-1]]
        rows = self._factors_of(call)[first.v_row : last.v_row + last.k_in]
        self._project(values, signs_KX, rows)

    def add_gradient(self, gradient: Tensor, signs_KX: Tensor, module: int, call: int) -> None:
        """Project an output gradient to the module's rows of u; a second one of a call adds to the first."""
        rows = self.layout.u(self._factors_of(call), module)
        if module not in self._has_gradient[call]:
            self._has_gradient[call].add(module)
            self._project(gradient, signs_KX, rows)
            return
        more = torch.empty_like(rows)
        self._project(gradient, signs_KX, more)
        rows += more

    def modules_without_gradient(self) -> list[int]:
        """Of all modules, those that no gradient has reached in any call."""
        reached = set().union(*self._has_gradient)
        return [module for module in range(len(self.layout.places)) if module not in reached]

    @torch.no_grad()
    def finish(self, dtype: torch.dtype, gradient_scale: Tensor | None) -> MicroBatch:
        """What was recorded, with the responses' gradients in `dtype`; `gradient_scale` is float64 [R]."""
        kept = [call for call, modules in enumerate(self._has_gradient) if modules]
        row_slots: list[tuple[int, int]] = [(first, end) for first, end in self.selection.row_slots.tolist()]
        shape = (len(row_slots), self.layout.gradient_dim)
        gradients_RD = torch.empty(shape, dtype=dtype, device=self.device)
        for number, call in enumerate(kept):
            factors = self.factors[call]
            for module in range(len(self.layout.places)):
                if module not in self._has_gradient[call]:
                    self.layout.v(factors, module).zero_()
                    self.layout.u(factors, module).zero_()
            out_RD = torch.empty_like(gradients_RD) if number else gradients_RD
            kernels.response_gradients(factors, row_slots, self.layout, out_RD)
            if number:
                gradients_RD += out_RD
        if gradient_scale is not None:
            scale_R = on_device(gradient_scale.numpy(), self.device)
            gradients_RD.mul_(scale_R.to(dtype).unsqueeze(1))
        kept_factors = tuple(self.factors[call] for call in kept)
        return MicroBatch(self.selection, kept_factors, gradients_RD, gradient_scale)

    def _factors_of(self, call: int) -> Tensor:
        while len(self.factors) <= call:
            shape = (self.layout.num_factors, self.selection.num_slots)
            self.factors.append(torch.empty(shape, dtype=self.dtype, device=self.device))
            self._has_gradient.append(set())
        return self.factors[call]

    def _project(self, values: Tensor, signs_KX: Tensor, out_KW: Tensor) -> None:
        flat_TX = values.detach().reshape(-1, signs_KX.shape[1])
        if flat_TX.stride(1) != 1:  # the gradient of a sum is expanded
            flat_TX = flat_TX.contiguous()
        kernels.project(flat_TX, signs_KX, self._source_W, out_KW)
