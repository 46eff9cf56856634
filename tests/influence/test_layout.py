"""Where numbers lie: no two in one place, none nowhere, and what a reader of one module or shape gets."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from influence.layout import FactorLayout

SHAPES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=8)


@given(SHAPES)
def test_every_row_and_column_belongs_to_one_module(shapes: list[tuple[int, int]]) -> None:
    layout = FactorLayout.of_shapes(shapes)
    rows = [row for p in layout.places for row in range(p.v_row, p.v_row + p.k_in)]
    rows += [row for p in layout.places for row in range(p.u_row, p.u_row + p.k_out)]
    assert rows == list(range(layout.num_factors))  # all v, then all u, in module order
    columns = [c for p in layout.places for c in range(p.gradient_start, p.gradient_start + p.dim)]
    assert sorted(columns) == list(range(layout.gradient_dim))
    assert [(p.k_out, p.k_in) for p in layout.places] == shapes


@given(SHAPES)
def test_a_class_shows_the_gradients_of_its_members_in_their_order(shapes: list[tuple[int, int]]) -> None:
    layout = FactorLayout.of_shapes(shapes)
    gradients_RD = torch.arange(2 * layout.gradient_dim).reshape(2, -1)
    assert sorted(m for c in layout.classes for m in c.members) == list(range(len(shapes)))
    for shape_class in layout.classes:
        part_RCD = shape_class.of(gradients_RD)
        for c, module in enumerate(shape_class.members):
            place = layout.places[module]
            assert (place.k_out, place.k_in) == (shape_class.k_out, shape_class.k_in)
            own = gradients_RD[:, place.gradient_start : place.gradient_start + place.dim]
            assert torch.equal(part_RCD[:, c], own)


def test_factors_of_a_module_are_views() -> None:
    layout = FactorLayout.of_shapes([(2, 3), (1, 1)])
    factors_FW = torch.zeros(layout.num_factors, 16)
    layout.v(factors_FW, 1).fill_(1.0)
    layout.u(factors_FW, 0).fill_(2.0)
    assert factors_FW[:, 0].tolist() == [0, 0, 0, 1, 2, 2, 0]
    assert layout.places[0].scale == 6**-0.5
