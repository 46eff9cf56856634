"""Where the numbers of each traced module lie in the tensors that hold all modules at once.

Three tensors hold what is known of a micro-batch or a step, whatever the number of modules:

* the *factors* of a micro-batch, ``[F, W]``: for every module k_in rows of v (projected inputs) and k_out
  rows of u (projected output gradients). A column is a *slot* for a token. Slots are contiguous, so that a
  read of few rows of a module is a read of whole cache lines; the v of all modules come first, in module
  order, so that modules which share their input can be projected in one product.
* the *gradients* of R responses, ``[R, D]``: the flattened ``G_r`` of every module (k_out x k_in, row-major),
  modules of one shape side by side.
* the *weights* ``M``, laid out as the gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ProjectedShape:
    """Of a module's projected gradient."""

    k_out: int
    k_in: int

    @property
    def dim(self) -> int:
        """D_m, the numbers of one projected gradient."""
        return self.k_out * self.k_in

    @property
    def scale(self) -> float:
        """``1 / sqrt(k_out k_in)``, of both sides' projections: factors are projected by signs alone."""
        return float(self.dim**-0.5)


@dataclass(frozen=True, slots=True)
class ModulePlace(ProjectedShape):
    """The rows and columns of one module."""

    v_row: int
    """Its first row of v in the factors."""
    u_row: int
    """Its first row of u in the factors."""
    gradient_start: int
    """Its first number in a flattened gradient."""


@dataclass(frozen=True, slots=True)
class ShapeClass(ProjectedShape):
    """Modules of one shape; their gradients lie side by side from `gradient_start` on."""

    members: tuple[int, ...]
    """Indices of modules, increasing."""
    gradient_start: int

    def of(self, gradients_RD: Tensor) -> Tensor:
        """The class's part of gradients or weights ``[..., D]``, a view ``[..., C, D_class]``."""
        part = gradients_RD[..., self.gradient_start : self.gradient_start + len(self.members) * self.dim]
        return part.view(*part.shape[:-1], len(self.members), self.dim)


@dataclass(frozen=True, slots=True)
class FactorLayout:
    """The places of all modules."""

    places: tuple[ModulePlace, ...]
    """In module order."""
    classes: tuple[ShapeClass, ...]
    """In the order in which their shapes first appear."""
    num_factors: int
    """F: numbers a token, 4,508 for a 1.5B Qwen2 at factor 256."""
    gradient_dim: int
    """D: numbers a response, over all modules."""

    @classmethod
    def of_shapes(cls, shapes: Sequence[tuple[int, int]]) -> FactorLayout:
        """For modules of these (k_out, k_in), in module order."""
        members: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, shape in enumerate(shapes):
            members[shape].append(index)
        classes, gradient_starts, start = [], [0] * len(shapes), 0
        for (k_out, k_in), indices in members.items():
            classes.append(ShapeClass(k_out, k_in, tuple(indices), start))
            for index in indices:
                gradient_starts[index] = start
                start += k_out * k_in
        places, v_row, u_row = [], 0, sum(k_in for _, k_in in shapes)
        for (k_out, k_in), gradient_start in zip(shapes, gradient_starts, strict=True):
            places.append(ModulePlace(k_out, k_in, v_row, u_row, gradient_start))
            v_row, u_row = v_row + k_in, u_row + k_out
        return cls(tuple(places), tuple(classes), num_factors=u_row, gradient_dim=start)

    def v(self, factors_FW: Tensor, module: int) -> Tensor:
        """A view ``[k_in, W]``."""
        place = self.places[module]
        return factors_FW[place.v_row : place.v_row + place.k_in]

    def u(self, factors_FW: Tensor, module: int) -> Tensor:
        """A view ``[k_out, W]``."""
        place = self.places[module]
        return factors_FW[place.u_row : place.u_row + place.k_out]
