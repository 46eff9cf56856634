"""Which numbers a response can be scored with, in the type of its gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class UsableRange:
    """The gradients and systems of which M and the scores fit the type that they are computed in.

    What lies outside counts as not finite: its scores would be infinite, or no number.
    """

    squared_norm_below: float
    """Of a response's gradient in a module; under ``identity`` scores grow with it, else M shrinks."""
    least_damping: float
    """Of a system with any gradient: M is at most ``|c| / (2 sqrt(lambda))``."""

    @classmethod
    def of(cls, dtype: torch.dtype, hessian: str) -> UsableRange:
        if dtype != torch.float32:
            return cls(math.inf, 0.0)
        return cls(2.0**110 if hessian == "identity" else 2.0**220, 2.0**-220)

    def is_too_small(self, damping: Tensor) -> Tensor:
        return (damping > 0) & (damping < self.least_damping)
