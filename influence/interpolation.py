"""Does a group's curvature fit every response exactly? Then a token's score says nothing new.

Where it does, each response's scores add up to its own contrast, whatever its tokens did.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from influence.layout import FactorLayout

TOLERANCE: Final = 0.05
"""A response's total within this fraction of its own contrast counts as interpolated."""


def interpolates(total: Any, contrast: Any) -> Any:
    """Whether systems [...] give every response its own contrast; tensors or NumPy arrays [..., R].

    Responses without contrast say nothing of it; a system in which none has any does not interpolate.
    """
    has_contrast = contrast != 0
    is_near = abs(total - contrast) < TOLERANCE * abs(contrast)
    return (is_near | ~has_contrast).all(-1) & has_contrast.any(-1)


def is_mostly_interpolated(
    interpolated_dim_N: NDArray[np.float64], layout: FactorLayout
) -> NDArray[np.bool_]:
    """Whether a group interpolates, by the numbers of a gradient in modules whose systems do (bool [N])."""
    return interpolated_dim_N > layout.gradient_dim / 2
