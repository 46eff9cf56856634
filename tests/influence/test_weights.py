"""What is noticed in a group's systems, on gradients made for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from influence.config import TracerConfig
from influence.groups import GatheredRows, plan_groups
from influence.layout import FactorLayout
from influence.weights import RowWeights, row_weights, solve_groups

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
