"""Which numbers a response can be scored with, and whether those that are left have anything to contrast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence.config import TracerConfig


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
        if dtype != torch.float32:  # float64, in which the squares are held, too
            return cls(math.inf, 2.0**-960)
        return cls(2.0**110 if hessian == "identity" else 2.0**220, 2.0**-220)

    def is_usable(self, squared_norm: Tensor, gradients: Sequence[Tensor]) -> Tensor:
        """Which gradients are, by the sums of their squares; `gradients` are those of some modules each."""
        is_inside = squared_norm < self.squared_norm_below
        if self.squared_norm_below < math.inf:
            return is_inside
        # The squares of float64 numbers can vanish in float64.
        is_zero = torch.cat([(part == 0).all(-1) for part in gradients])
        return is_inside & ((squared_norm > 0) | is_zero)

    def is_too_small(self, damping: Tensor) -> Tensor:
        return (damping > 0) & (damping < self.least_damping)


def has_contrast(contrast: Any, is_finite: Any, config: TracerConfig) -> Any:
    """Whether systems [...] have contrast without the gradients that are not finite: see `plan_groups`.

    Tensors or NumPy arrays [..., R]; the contrasts are zero where the gradient is not finite.
    """
    is_positive, is_negative = (contrast > 0).any(-1), (contrast < 0).any(-1)
    if config.contrast == "accepted_minus_rejected":
        has = is_positive & is_negative
    else:
        has = is_positive | is_negative
    return has & (is_finite.sum(-1) > 1) if config.exclude_self else has
