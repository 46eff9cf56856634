"""What is noticed in a group's systems, on gradients made for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from influence.config import TracerConfig
from influence.groups import GatheredRows, plan_groups
from influence.layout import FactorLayout
from influence.weights import RowWeights, blocks_of_one_dim, row_weights, solve_groups

# Two accepted responses alike, two rejected responses alike, the two kinds orthogonal.
G_RD = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0]], dtype=torch.float64)
ONE_MODULE = FactorLayout.of_shapes([(1, 3)])
CONTRAST = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)


def interpolated(G: Tensor, *, exclude_self: bool = False, damping: float = 1e-4) -> bool:
    config = TracerConfig(damping=damping, exclude_self=exclude_self)
    solution = solve_groups(G[None], CONTRAST[None], ONE_MODULE, config)
    return bool(solution.is_interpolated)


def test_totals_equal_to_the_contrast_are_noticed() -> None:
    assert interpolated(G_RD)
    assert not interpolated(G_RD, damping=1.0)


def test_a_good_prediction_of_a_response_left_out_is_no_interpolation() -> None:
    solution = solve_groups(G_RD[None], CONTRAST[None], ONE_MODULE, TracerConfig(damping=1e-4))
    assert solution.total[0].tolist() == pytest.approx(CONTRAST.tolist(), abs=1e-3)
    assert not interpolated(G_RD, exclude_self=True)


def test_a_response_that_is_not_finite_hides_no_interpolation() -> None:
    G = G_RD.clone()
    G[3, 0] = torch.nan
    assert interpolated(G)


# As a Qwen2 has them at factor 256: of seven modules a layer, three of 210 dimensions, two of 36, two of 6.
LAYER_SHAPES = [(6, 6), (1, 6), (1, 6), (6, 6), (35, 6), (35, 6), (6, 35)]


def reference_weights(shapes: list[tuple[int, int]]) -> RowWeights:
    layout, config = FactorLayout.of_shapes(shapes), TracerConfig.reference_run()
    torch.manual_seed(0)
    contrast = [1.0, -1.0] * 8
    rows = GatheredRows([0] * 16, contrast, range(16), torch.randn(16, layout.gradient_dim))
    return row_weights(rows, plan_groups(rows.groups, contrast, rows.local, config), layout, config)


def test_a_group_interpolates_where_most_of_its_dimensions_do() -> None:
    # The systems of 210 dimensions interpolate, and are three of seven, with 88 % of the dimensions.
    assert reference_weights(LAYER_SHAPES * 2).num_interpolated == 1
    # Here they are one of nine, with less than half of the dimensions.
    assert reference_weights([(35, 6)] + [(6, 6)] * 8).num_interpolated == 0


def test_systems_that_fail_are_solved_again_with_a_floor() -> None:
    # Four equal rows, and a damping below the rounding of their Gram matrix.
    G_ND = torch.full((4, 3), 0.1, dtype=torch.float64)
    config = TracerConfig(damping=1e-30, exclude_self=False)
    contrast = [1.0] * 4
    rows = GatheredRows([0] * 4, contrast, range(4), G_ND)
    weights = row_weights(rows, plan_groups(rows.groups, contrast, rows.local, config), ONE_MODULE, config)
    assert weights.num_floors == 1
    # Equal gradients fit equal contrasts, but for what rounding leaves in the other directions.
    assert weights.total == pytest.approx([1.0] * 4, rel=0.1)


@pytest.mark.parametrize(("hessian", "size"), [("response", 1e-38), ("response", 1e35), ("identity", 1e20)])
def test_gradients_whose_scores_would_overflow_are_dropped_and_counted(hessian: str, size: float) -> None:
    layout = FactorLayout.of_shapes([(2, 3), (1, 4)])
    generator = torch.Generator().manual_seed(0)
    G_ND = torch.randn(4, layout.gradient_dim, generator=generator)
    G_ND[:, :6] *= size
    contrast = [1.0, -1.0, 1.0, -1.0]
    rows = GatheredRows([0] * 4, contrast, range(4), G_ND)
    config = TracerConfig(hessian=hessian)
    plan = plan_groups(rows.groups, contrast, rows.local, config)
    weights = row_weights(rows, plan, layout, config)
    assert weights.num_dropped == [4, 0]
    assert weights.is_finite.tolist() == [[False, True]] * 4
    assert weights.matrices.isfinite().all()
    expected = row_weights(
        GatheredRows([0] * 4, contrast, range(4), G_ND[:, 6:].contiguous()),
        plan,
        FactorLayout.of_shapes([(1, 4)]),
        config,
    )
    torch.testing.assert_close(weights.matrices[:, 6:], expected.matrices)
    assert weights.total == pytest.approx(expected.total)


@pytest.mark.parametrize("hessian", ["response", "identity"])
def test_where_only_one_sign_is_left_a_module_has_no_contrast(hessian: str) -> None:
    layout = FactorLayout.of_shapes([(2, 3), (1, 4)])
    config = TracerConfig(objective="log_prob", contrast="accepted_minus_rejected", hessian=hessian)
    contrast = [1.0, 1.0, -1.0, 1.0]
    for lost, is_scored in ((slice(0, 6), True), (slice(0, 10), False)):
        G_ND = torch.randn(4, layout.gradient_dim, generator=torch.Generator().manual_seed(0))
        G_ND[2, lost] = torch.nan
        rows = GatheredRows([0] * 4, contrast, range(4), G_ND)
        plan = plan_groups(rows.groups, contrast, rows.local, config)
        weights = row_weights(rows, plan, layout, config)
        assert not weights.matrices[:, lost].any()
        assert weights.is_scored == [is_scored] * 4
        assert sum(weights.num_dropped) == (1 if is_scored else 2)


@pytest.mark.parametrize("size", [1e-170, 1e-150, 1e160])
def test_float64_gradients_whose_squares_vanish_are_dropped_and_counted(size: float) -> None:
    layout, config, contrast = FactorLayout.of_shapes([(2, 3)]), TracerConfig(), [1.0, -1.0, 1.0, -1.0]
    G_ND = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * size
    plan = plan_groups([0] * 4, contrast, range(4), config)
    weights = row_weights(GatheredRows([0] * 4, contrast, range(4), G_ND), plan, layout, config)
    assert (weights.num_dropped, weights.is_scored) == ([4], [False] * 4)
    zero = row_weights(GatheredRows([0] * 4, contrast, range(4), G_ND * 0), plan, layout, config)
    assert (zero.num_dropped, zero.is_scored) == ([0], [True] * 4)


@pytest.mark.parametrize("size", [1e-31, 1e31])
def test_gradients_that_are_just_inside_are_solved_as_any(size: float) -> None:
    layout, config = FactorLayout.of_shapes([(2, 3)]), TracerConfig()
    G_ND, contrast = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), [1.0, -1.0, 1.0, -1.0]
    plan = plan_groups([0] * 4, contrast, range(4), config)
    one, other = (
        row_weights(GatheredRows([0] * 4, contrast, range(4), G), plan, layout, config)
        for G in (G_ND, G_ND * size)
    )
    assert other.num_dropped == [0]
    torch.testing.assert_close(other.matrices.double() * size, one.matrices.double(), rtol=1e-5, atol=1e-6)
    assert other.total == pytest.approx(one.total, rel=1e-5)


def test_modules_are_named_in_their_order_and_not_by_shape() -> None:
    # Classes are (1, 2): modules 0 and 2, then (1, 3): module 1.
    layout = FactorLayout.of_shapes([(1, 2), (1, 3), (1, 2)])
    torch.manual_seed(0)
    G_ND = torch.randn(4, 7)
    G_ND[2, layout.places[1].gradient_start + 1] = torch.inf
    rows = GatheredRows([0] * 4, [1.0, -1.0, 1.0, -1.0], range(4), G_ND)
    config = TracerConfig()
    weights = row_weights(rows, plan_groups(rows.groups, rows.contrast, rows.local, config), layout, config)
    assert (~weights.is_finite).nonzero().tolist() == [[2, 1]]
    assert weights.num_dropped == [0, 1, 0]


def test_neighbouring_shapes_of_one_size_are_solved_together() -> None:
    layout = FactorLayout.of_shapes([(2, 3), (1, 4), (3, 2), (6, 1), (2, 2), (2, 3)])
    # By class: (2, 3) twice, (1, 4), (3, 2), (6, 1), (2, 2).
    assert blocks_of_one_dim(layout) == [(0, 2, 6), (12, 1, 4), (16, 2, 6), (28, 1, 4)]


def on_rank_with_rows(local: range, config: TracerConfig, contrast: list[float]) -> RowWeights:
    # Two modules and two groups, all with the same gradients.
    gradients = torch.cat([G_RD, G_RD]).repeat(1, 2)
    groups = [0, 0, 0, 0, 1, 1, 1, 1]
    rows = GatheredRows(groups, contrast, local, gradients)
    layout = FactorLayout.of_shapes([(1, 3), (1, 3)])
    return row_weights(rows, plan_groups(groups, contrast, local, config), layout, config)


def test_a_group_is_counted_where_its_first_row_is() -> None:
    config = TracerConfig(damping=1e-4, exclude_self=False)
    contrast = [*CONTRAST.tolist(), *CONTRAST.tolist()]
    for local, counted in ((range(8), 2), (range(6), 2), (range(4, 8), 1), (range(1, 4), 0)):
        weights = on_rank_with_rows(local, config, contrast)
        assert weights.num_interpolated == counted
        assert weights.effective_dof == pytest.approx(2 * counted, abs=1e-3)


def test_rows_of_a_rank_get_the_weights_of_their_whole_group() -> None:
    config = TracerConfig()
    contrast = [1.0, 2.0, -1.0, 0.5, -3.0, 1.0, 1.0, 2.0]
    whole = on_rank_with_rows(range(8), config, contrast)
    for local in (range(3), range(2, 7), range(7, 8), range(3, 3)):
        part = on_rank_with_rows(local, config, contrast)
        chosen = list(local)
        assert torch.equal(part.matrices, whole.matrices[chosen])
        assert part.total == [whole.total[row] for row in chosen]
        assert part.is_scored == [True] * len(chosen)
