"""The reference kernels against sums written out, number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from influence import kernels
from influence.layout import FactorLayout

SHAPES = [(3, 2), (1, 2), (3, 2), (5, 4), (2, 3)]
NAN = float("nan")


def slots(*lengths: int) -> tuple[list[tuple[int, int]], int]:
    """First and end slots of rows of these lengths, and W."""
    bounds, start = [], 0
    for length in lengths:
        bounds.append((start, start + length))
        start += -(-length // kernels.SLOT_ALIGNMENT) * kernels.SLOT_ALIGNMENT
    return bounds, start


def factors(layout: FactorLayout, num_slots: int, bounds: list[tuple[int, int]], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(layout.num_factors, num_slots, generator=generator, dtype=torch.float64)
    is_token = torch.zeros(num_slots, dtype=torch.bool)
    for first, end in bounds:
        is_token[first:end] = True
    return values * is_token


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_project_sums_the_tokens_that_slots_name(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(7, 20, generator=generator).to(dtype)
    values[3] = NAN  # captured by no slot
    storage = torch.float32 if dtype == torch.float16 else dtype
    signs = torch.randint(0, 2, (4, 20), generator=generator).mul(2).sub(1).to(storage)
    source = torch.full((16,), -1, dtype=torch.int32)
    source[:6] = torch.tensor([6, 0, 1, 5, 4, 2])
    out = torch.full((6, 16), NAN, dtype=storage)
    kernels.project(values, signs, source, out[1:5])

    expected = torch.zeros(4, 16, dtype=torch.float64)
    for k in range(4):
        for slot in range(6):
            for x in range(20):
                expected[k, slot] += float(signs[k, x]) * float(values[int(source[slot]), x])
    tolerance = {torch.bfloat16: 1e-2, torch.float64: 1e-14}.get(dtype, 1e-5)
    torch.testing.assert_close(out[1:5].double(), expected, rtol=tolerance, atol=tolerance)
    assert out[0].isnan().all() and out[5].isnan().all()


def test_response_gradients_are_sums_of_outer_products() -> None:
    layout = FactorLayout.of_shapes(SHAPES)
    bounds, num_slots = slots(5, 17, 1)
    captured = factors(layout, num_slots, bounds)
    out = torch.full((3, layout.gradient_dim), NAN, dtype=torch.float64)
    kernels.response_gradients(captured, bounds, layout, out)

    for row, (first, end) in enumerate(bounds):
        for place in layout.places:
            for o in range(place.k_out):
                for i in range(place.k_in):
                    total = sum(
                        float(captured[place.u_row + o, slot] * captured[place.v_row + i, slot])
                        for slot in range(first, end)
                    )
                    got = out[row, place.gradient_start + o * place.k_in + i]
                    assert float(got) == pytest.approx(total * place.scale, rel=1e-12)


def test_scores_are_inner_products_with_the_weights_of_the_row() -> None:
    layout = FactorLayout.of_shapes(SHAPES)
    (bounds_a, slots_a), (bounds_b, slots_b) = slots(5, 300), slots(17)
    chunks = [factors(layout, slots_a, bounds_a, 1), factors(layout, slots_b, bounds_b, 2)]
    weights = torch.randn(3, layout.gradient_dim, generator=torch.Generator().manual_seed(3)).double()
    is_finite = torch.ones(3, len(SHAPES), dtype=torch.bool)
    # Row 2 lies in the first chunk, row 0 in the second, row 1 nowhere; a module of row 2 is not finite.
    is_finite[2, 1] = False
    weights[2, layout.places[1].gradient_start] = NAN
    chunks[0][layout.places[1].u_row, bounds_a[1][0]] = NAN
    chunks[0][:, bounds_a[0][0]] = NAN
    rows = [(0, *bounds_a[1], 2), (1, *bounds_b[0], 0)]
    tiles = torch.from_numpy(kernels.token_tiles(*zip(*rows, strict=True)))
    out = torch.full((slots_a + slots_b,), NAN, dtype=torch.float64)
    kernels.score(chunks, tiles, weights, is_finite, layout, out)

    expected = torch.zeros_like(out)
    for chunk, first, end, row in rows:
        for slot in range(first, end):
            for module, place in enumerate(layout.places):
                if is_finite[row, module]:
                    u = chunks[chunk][place.u_row : place.u_row + place.k_out, slot]
                    v = chunks[chunk][place.v_row : place.v_row + place.k_in, slot]
                    part = weights[row, place.gradient_start : place.gradient_start + place.dim]
                    expected[chunk * slots_a + slot] += u @ part.view(place.k_out, place.k_in) @ v
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_tiles_cover_every_slot_of_every_row_once() -> None:
    columns = ([0, 0, 3, 1], [0, 16, 32, 48], [1, 16, 32 + 513, 48 + 256], [5, 6, 7, 2])
    tiles = kernels.token_tiles(*columns)
    assert tiles.dtype == np.int32
    assert tiles[:, 2].min() > 0 and tiles[:, 2].max() <= kernels.TILE_SLOTS
    covered = [
        (c, slot, row) for c, first, length, row in tiles.tolist() for slot in range(first, first + length)
    ]
    rows = zip(*columns, strict=True)
    assert covered == [(c, slot, row) for c, first, end, row in rows for slot in range(first, end)]
    assert kernels.token_tiles([], [], [], []).shape == (0, 4)


def test_only_known_choices_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.KERNELS_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="INFL_KERNELS is 'cuda'; it can be 'auto'"):
        kernels._may_use_kernels()
