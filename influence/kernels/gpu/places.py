"""Tables of a layout's places on a device, for the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
from torch import Tensor

from influence.kernels.tiles import on_device
from influence.layout import FactorLayout


@dataclass(frozen=True, slots=True, eq=False)
class ClassPlaces:
    """Where the modules of a shape lie."""

    k_out: int
    k_in: int
    scale: float
    num_modules: int
    table: Tensor
    """int32 [num_modules, 4]: first row of v, first row of u, first number of the gradient, module."""
    alignment: int
    """A power of two that divides where each row of each module's gradient starts, at most 16."""


_places: dict[tuple[int, torch.device], tuple[FactorLayout, tuple[ClassPlaces, ...]]] = {}


def class_places(layout: FactorLayout, device: torch.device) -> tuple[ClassPlaces, ...]:
    """By class, copied to the device once a layout."""
    # By identity, since hashing hundreds of places would take longer than a launch.
    # The entry keeps the layout alive.
    key = (id(layout), device)
    if key not in _places:
        _places[key] = (layout, _class_places(layout, device))
    return _places[key][1]


def _class_places(layout: FactorLayout, device: torch.device) -> tuple[ClassPlaces, ...]:
    classes = []
    for shape_class in layout.classes:
        places = [layout.places[module] for module in shape_class.members]
        rows = [
            (place.v_row, place.u_row, place.gradient_start, module)
            for module, place in zip(shape_class.members, places, strict=True)
        ]
        table = on_device(np.array(rows, dtype=np.int32), device)
        classes.append(
            ClassPlaces(
                k_out=shape_class.k_out,
                k_in=shape_class.k_in,
                scale=shape_class.scale,
                num_modules=len(places),
                table=table,
                alignment=_alignment(rows, shape_class.k_in),
            )
        )
    return tuple(classes)


def _alignment(rows: list[tuple[int, int, int, int]], k_in: int) -> int:
    return gcd(16, k_in, *(gradient_start for _, _, gradient_start, _ in rows))
