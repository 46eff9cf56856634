"""The Triton kernels against the reference in float64; without a GPU they run in Triton's interpreter."""

# ruff: noqa: E402 - what is imported depends on the environment that is set first

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    if "triton" in sys.modules:
        pytest.skip("triton was imported to compile; it cannot interpret now", allow_module_level=True)
    # Read while triton is imported, and again where a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton")

from influence import kernels
from influence.config import TracerConfig
from influence.groups import GatheredRows, plan_groups
from influence.kernels import plain
from influence.kernels.gpu.group_solve import solve_groups_into
from influence.kernels.gpu.project import project
from influence.kernels.gpu.response_gradients import SEGMENT_SLOTS, response_gradients
from influence.kernels.gpu.score import score
from influence.launched_weights import launch_row_weights
from influence.layout import FactorLayout
from influence.weights import row_weights, solve_groups

os.environ.pop("TRITON_INTERPRET", None)

NAN = float("nan")
BFLOAT16_ERROR = 4e-3 if DEVICE.type == "cuda" else 1.2e-2
"""Of rounding to bfloat16; the interpreter cuts off instead, inputs and sums."""
SHAPES = [(6, 6), (1, 6), (35, 6), (6, 35), (6, 6), (12, 12), (40, 9), (9, 140), (70, 66)]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps bfloat16 as 16-bit integers, and would multiply those in a matrix product."""
    if DEVICE.type == "cuda":
        return
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from triton import language as tl
    from triton.runtime import interpreter

    def as_float32(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    create_dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *rest: create_dot(self, as_float32(a), as_float32(b), *rest),
    )


@pytest.fixture
def generator() -> Iterator[torch.Generator]:
    yield torch.Generator().manual_seed(0)


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.isfinite().all()
    return float((got.double() - expected).norm() / expected.norm())


def captured(
    layout: FactorLayout, lengths: list[int], generator: torch.Generator
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Factors of rows of these lengths with zeros in their padding, and the rows' slots."""
    bounds, start = [], 0
    for length in lengths:
        bounds.append((start, start + length))
        start += -(-length // kernels.SLOT_ALIGNMENT) * kernels.SLOT_ALIGNMENT
    factors = torch.zeros(layout.num_factors, start)
    for first, end in bounds:
        factors[:, first:end] = torch.randn(layout.num_factors, end - first, generator=generator)
    return factors.to(DEVICE, torch.bfloat16), bounds


@pytest.mark.parametrize(
    ("k", "width", "dtype"),
    [
        (1, 64, torch.bfloat16),
        (18, 192, torch.bfloat16),
        (35, 100, torch.bfloat16),
        (12, 128, torch.float32),
        (6, 64, torch.float16),
        (130, 64, torch.bfloat16),
    ],
)
def test_project(k: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    values = torch.randn(90, width, generator=generator).to(dtype)
    signs = torch.randint(0, 2, (k, width), generator=generator).mul(2).sub(1).bfloat16()
    source = torch.full((96,), -1, dtype=torch.int32)
    source[:40], source[48:81] = torch.arange(80, 40, -1), torch.arange(33)
    unnamed = [token for token in range(90) if token not in set(source.tolist())]
    values[unnamed] = NAN
    values, signs, source = values.to(DEVICE), signs.to(DEVICE), source.to(DEVICE)
    factors = torch.full((k + 2, 96), NAN, dtype=torch.bfloat16, device=DEVICE)
    project(values, signs, source, factors[1:-1])

    expected = torch.empty(k, 96, dtype=torch.float64, device=DEVICE)
    plain.project(values.bfloat16().double(), signs.double(), source, expected)
    assert relative_error(factors[1:-1], expected) < BFLOAT16_ERROR
    assert not factors[1:-1, source < 0].any()
    assert factors[[0, -1]].isnan().all()


def test_project_a_part_of_the_slots_leaves_the_others(generator: torch.Generator) -> None:
    values = torch.randn(16, 64, generator=generator).to(DEVICE, torch.bfloat16)
    signs = torch.ones(3, 64, dtype=torch.bfloat16, device=DEVICE)
    factors = torch.full((3, 64), NAN, dtype=torch.bfloat16, device=DEVICE)
    project(values, signs, torch.arange(16, dtype=torch.int32, device=DEVICE), factors[:, 16:32])
    assert factors[:, 16:32].isfinite().all()
    assert factors[:, :16].isnan().all() and factors[:, 32:].isnan().all()


def test_response_gradients(generator: torch.Generator) -> None:
    layout = FactorLayout.of_shapes(SHAPES)
    factors, bounds = captured(layout, [1, 2 * SEGMENT_SLOTS + 17, 16, SEGMENT_SLOTS], generator)
    out = torch.full((4, layout.gradient_dim), NAN, device=DEVICE)
    response_gradients(factors, bounds, layout, out)
    expected = torch.empty(4, layout.gradient_dim, dtype=torch.float64, device=DEVICE)
    plain.response_gradients(factors, bounds, layout, expected)
    for row in range(4):
        assert relative_error(out[row], expected[row]) < 2e-6
    again = torch.empty_like(out)
    response_gradients(factors, bounds, layout, again)
    assert torch.equal(out, again)


def test_response_gradients_of_a_row_without_slots_are_zero(generator: torch.Generator) -> None:
    layout = FactorLayout.of_shapes(SHAPES[:2])
    factors, bounds = captured(layout, [16, 0, 5], generator)
    out = torch.full((3, layout.gradient_dim), NAN, device=DEVICE)
    response_gradients(factors, bounds, layout, out)
    assert not out[1].any() and out[0].any() and out[2].any()


def test_score(generator: torch.Generator) -> None:
    layout = FactorLayout.of_shapes(SHAPES)
    lengths = [[5, kernels.TILE_SLOTS + 40, 30], [kernels.TILE_SLOTS], [17]]
    chunks, bounds = zip(*(captured(layout, rows, generator) for rows in lengths), strict=True)
    # Row 1 is in no tile and its factors are not finite; modules of rows 2 and 4 are not finite.
    chunks[0][:, bounds[0][0][0] : bounds[0][0][1]] = NAN
    weights = torch.randn(5, layout.gradient_dim, generator=generator).to(DEVICE)
    is_finite = torch.ones(5, len(SHAPES), dtype=torch.bool, device=DEVICE)
    for row, module, chunk, slot in (
        (2, 2, 0, bounds[0][1][0] + 3),
        (4, 7, 1, 9),
        (2, 5, 0, bounds[0][1][0]),
    ):
        is_finite[row, module] = False
        weights[row, layout.places[module].gradient_start] = NAN
        chunks[chunk][layout.places[module].u_row, slot] = NAN
    rows = [(0, *bounds[0][1], 2), (0, *bounds[0][2], 0), (1, *bounds[1][0], 4), (2, *bounds[2][0], 3)]
    tiles = torch.from_numpy(kernels.token_tiles(*zip(*rows, strict=True))).to(DEVICE)
    num_slots = sum(chunk.shape[1] for chunk in chunks)
    out = torch.full((num_slots,), NAN, device=DEVICE)
    score(chunks, tiles, weights, is_finite, layout, out)

    expected = torch.full((num_slots,), NAN, dtype=torch.float64, device=DEVICE)
    plain.score(chunks, tiles, weights, is_finite, layout, expected)
    assert (expected != 0).sum() == sum(end - first for _, first, end, _ in rows)
    assert relative_error(out, expected) < 2e-5
    assert torch.equal(out == 0, expected == 0)
    again = torch.empty_like(out)
    score(chunks, tiles, weights, is_finite, layout, again)
    assert torch.equal(out, again)


def test_score_takes_a_chunk_without_slots(generator: torch.Generator) -> None:
    layout = FactorLayout.of_shapes(SHAPES[:2])
    factors, bounds = captured(layout, [20], generator)
    tiles = torch.from_numpy(kernels.token_tiles([1], [bounds[0][0]], [bounds[0][1]], [0])).to(DEVICE)
    weights = torch.randn(1, layout.gradient_dim, generator=generator).to(DEVICE)
    is_finite = torch.ones(1, 2, dtype=torch.bool, device=DEVICE)
    found, expected = (torch.empty(factors.shape[1], device=DEVICE) for _ in range(2))
    score([factors[:, :0].contiguous(), factors], tiles, weights, is_finite, layout, found)
    plain.score([factors[:, :0], factors], tiles, weights, is_finite, layout, expected)
    assert relative_error(found, expected) < 2e-5


def test_score_refuses_what_is_not_aligned(generator: torch.Generator) -> None:
    layout = FactorLayout.of_shapes(SHAPES[:1])
    factors, _ = captured(layout, [64], generator)
    tiles = torch.from_numpy(kernels.token_tiles([0], [0], [16], [0])).to(DEVICE)
    weights = torch.zeros(1, layout.gradient_dim, device=DEVICE)
    is_finite = torch.ones(1, 1, dtype=torch.bool, device=DEVICE)
    for chunk in (factors[:, 1:17], factors.flatten()[: 12 * 24].view(12, 24)):
        with pytest.raises(ValueError, match="multiples of 16"):
            score([chunk], tiles, weights, is_finite, layout, torch.empty(chunk.shape[1], device=DEVICE))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="chooses kernels on a GPU alone")
def test_bfloat16_factors_on_a_gpu_get_the_kernels(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = FactorLayout.of_shapes(SHAPES[:3])
    factors, bounds = captured(layout, [20], generator)

    def refuse(*_: object) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(plain, "response_gradients", refuse)
    out = torch.empty(1, layout.gradient_dim, device=DEVICE)
    kernels.response_gradients(factors, bounds, layout, out)
    monkeypatch.setenv(kernels.KERNELS_VARIABLE, "plain")
    with pytest.raises(AssertionError, match="the reference ran"):
        kernels.response_gradients(factors, bounds, layout, out)


@pytest.mark.parametrize(
    ("hessian", "mode", "exclude_self"),
    [
        ("response", "trace_over_responses", True),
        ("response", "trace_over_responses", False),
        ("response", "trace_over_dim", False),
        ("identity", "trace_over_responses", True),
        ("identity", "trace_over_responses", False),
    ],
)
@pytest.mark.parametrize("num_rows", [1, 3, 16, 20, 40])
def test_groups_are_solved_as_by_the_reference(
    hessian: str, mode: str, exclude_self: bool, num_rows: int
) -> None:
    layout = FactorLayout.of_shapes([(3, 2), (1, 2), (3, 2), (5, 4), (2, 3), (7, 5)])
    generator = torch.Generator().manual_seed(num_rows)
    gradients = torch.randn(2 * num_rows + 3, layout.gradient_dim, generator=generator)
    gradients[1, 2], gradients[4, 20] = NAN, float("inf")
    rows = torch.randperm(2 * num_rows + 3, generator=generator)[: 2 * num_rows].view(2, num_rows)
    contrast = torch.randn(2, num_rows, generator=generator, dtype=torch.float64)
    local = torch.randperm(2 * num_rows, generator=generator).view(2, num_rows)
    local[0, 0] = -1  # of another rank
    config = TracerConfig(hessian=hessian, damping_mode=mode, exclude_self=exclude_self)
    expected = solve_groups(gradients[rows], contrast, layout, config)

    weights = torch.full((2 * num_rows, layout.gradient_dim), NAN, device=DEVICE)
    is_finite = torch.ones(2 * num_rows, len(layout.places), dtype=torch.bool, device=DEVICE)
    notes = solve_groups_into(
        gradients.to(DEVICE),
        rows.to(DEVICE),
        contrast.to(DEVICE),
        local.to(DEVICE),
        layout,
        weights,
        is_finite,
        rule="identity" if hessian == "identity" else mode,
        damping=torch.tensor([config.damping], dtype=torch.float64, device=DEVICE),
        exclude_self=exclude_self,
    ).cpu()
    weights, is_finite = weights.cpu(), is_finite.cpu()

    is_local = local >= 0
    torch.testing.assert_close(weights[local[is_local]], expected.weights[is_local], rtol=1e-5, atol=1e-6)
    order = [index for kind in layout.classes for index in kind.members]
    assert torch.equal(is_finite[local[is_local]][:, order], expected.is_finite.permute(1, 2, 0)[is_local])
    assert torch.equal(notes[..., num_rows : 2 * num_rows] > 0, expected.is_finite)
    torch.testing.assert_close(notes[..., :num_rows].sum(0), expected.total, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(notes[..., -2], expected.effective_dof, rtol=1e-9, atol=1e-9)
    assert not notes[..., -1].any()


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("local", [range(9), range(2, 6)])
def test_launched_weights_are_those_of_the_reference(
    local: range, exclude_self: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of two sizes and one without contrast, whose rows lie on several ranks."""
    layout = FactorLayout.of_shapes([(3, 2), (1, 2), (3, 2)])
    generator = torch.Generator().manual_seed(3)
    gradients = torch.randn(9, layout.gradient_dim, generator=generator)
    gradients[3, 1] = NAN
    groups, contrast = [0, 1, 0, 1, 1, 2, 2, 0, 0], [1.0, -1, -1, 1, 1, 1, 1, 1, -1]
    config = TracerConfig(
        objective="log_prob",
        contrast="accepted_minus_rejected",
        damping=1e-3,
        damping_mode="trace_over_dim",
        exclude_self=exclude_self,
    )
    plan = plan_groups(groups, contrast, local, config)
    expected = row_weights(GatheredRows(groups, contrast, local, gradients), plan, layout, config)

    monkeypatch.setattr(kernels, "solves_groups", lambda gradients, num_rows: True)
    on_device = GatheredRows(groups, contrast, local, gradients.to(DEVICE))
    launched = launch_row_weights(on_device, plan, layout, config)
    found = launched.finish()
    assert found.matrices is launched.matrices
    torch.testing.assert_close(found.matrices.cpu(), expected.matrices, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.is_finite.cpu(), expected.is_finite)
    assert found.total == pytest.approx(expected.total, rel=1e-9, abs=1e-9)
    assert found.is_scored == expected.is_scored
    assert found.num_dropped == expected.num_dropped
    assert (found.num_floors, found.num_interpolated) == (0, expected.num_interpolated)
    assert found.effective_dof == pytest.approx(expected.effective_dof)


@pytest.mark.parametrize(
    ("shapes", "num_interpolated"),
    [([(6, 6), (1, 6), (1, 6), (6, 6), (35, 6), (35, 6), (6, 35)], 1), ([(35, 6)] + [(6, 6)] * 8, 0)],
)
def test_a_group_interpolates_where_most_of_its_dimensions_do(
    shapes: list[tuple[int, int]], num_interpolated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, config = FactorLayout.of_shapes(shapes), TracerConfig.reference_run()
    contrast = [1.0, -1.0] * 8
    gradients = torch.randn(16, layout.gradient_dim, generator=torch.Generator().manual_seed(0))
    rows = GatheredRows([0] * 16, contrast, range(16), gradients.to(DEVICE))
    monkeypatch.setattr(kernels, "solves_groups", lambda gradients, num_rows: True)
    plan = plan_groups(rows.groups, contrast, rows.local, config)
    assert launch_row_weights(rows, plan, layout, config).finish().num_interpolated == num_interpolated


@pytest.mark.parametrize(("hessian", "size"), [("response", 1e-38), ("response", 1e35), ("identity", 1e20)])
@pytest.mark.parametrize("exclude_self", [True, False])
def test_gradients_whose_scores_would_overflow_are_dropped(
    hessian: str, size: float, exclude_self: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = FactorLayout.of_shapes([(3, 2), (1, 2), (3, 2)])
    gradients = torch.randn(6, layout.gradient_dim, generator=torch.Generator().manual_seed(1))
    gradients[:, 6:12] *= size  # the third module
    groups, contrast = [0, 0, 0, 1, 1, 1], [1.0, -1, 1, 1, -1, -1]
    config = TracerConfig(hessian=hessian, exclude_self=exclude_self)
    plan = plan_groups(groups, contrast, range(6), config)
    expected = row_weights(GatheredRows(groups, contrast, range(6), gradients), plan, layout, config)
    assert expected.num_dropped == [0, 0, 6]

    monkeypatch.setattr(kernels, "solves_groups", lambda gradients, num_rows: True)
    rows = GatheredRows(groups, contrast, range(6), gradients.to(DEVICE))
    found = launch_row_weights(rows, plan, layout, config).finish()
    assert found.num_dropped == expected.num_dropped
    assert torch.equal(found.is_finite.cpu(), expected.is_finite)
    torch.testing.assert_close(found.matrices.cpu(), expected.matrices, rtol=1e-5, atol=1e-6)
    assert found.total == pytest.approx(expected.total, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("hessian", ["response", "identity"])
def test_where_only_one_sign_is_left_a_module_has_no_contrast(
    hessian: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = FactorLayout.of_shapes([(3, 2), (1, 2), (3, 2)])
    gradients = torch.randn(6, layout.gradient_dim, generator=torch.Generator().manual_seed(1))
    gradients[1, 6:12] = gradients[3] = NAN
    groups, contrast = [0, 0, 0, 1, 1, 1], [1.0, -1, 1, -1, 1, 1]
    config = TracerConfig(objective="log_prob", contrast="accepted_minus_rejected", hessian=hessian)
    plan = plan_groups(groups, contrast, range(6), config)
    expected = row_weights(GatheredRows(groups, contrast, range(6), gradients), plan, layout, config)
    assert expected.is_scored == [True] * 3 + [False] * 3

    monkeypatch.setattr(kernels, "solves_groups", lambda gradients, num_rows: True)
    rows = GatheredRows(groups, contrast, range(6), gradients.to(DEVICE))
    found = launch_row_weights(rows, plan, layout, config).finish()
    torch.testing.assert_close(found.matrices.cpu(), expected.matrices, rtol=1e-5, atol=1e-6)
    assert found.total == pytest.approx(expected.total, rel=1e-9, abs=1e-9)
    assert found.is_scored == expected.is_scored
    assert found.num_dropped == expected.num_dropped
