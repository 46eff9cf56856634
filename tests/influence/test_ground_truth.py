"""The tracer against the definition: hooks, Gram dual and downdates against autograd and a dense solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch

from influence import TracerConfig
from influence.config import DEFAULT_MODULES
from tests.influence.brute_force import (
    PositionGradients,
    dense_scores,
    position_gradients,
    projected,
    relative_error,
)
from tests.influence.tiny_model import Response, TinyTransformer, make_responses
from tests.influence.tracing import trace

RESPONSES = make_responses(num_responses=7, num_groups=2)
CONTRASTS: dict[str, Callable[[Response], float]] = {
    "none": lambda r: 1.0,
    "accepted_minus_rejected": lambda r: r.contrast,
    "advantage": lambda r: r.advantage,
}


@pytest.fixture(scope="module")
def gradients() -> PositionGradients:
    return position_gradients(TinyTransformer(), RESPONSES, DEFAULT_MODULES)


def assert_same_scores(
    config: TracerConfig, gradients: PositionGradients, model: TinyTransformer, tolerance: float = 1e-10
) -> None:
    responses = [replace(r, contrast=CONTRASTS[config.contrast](r)) for r in RESPONSES]
    rows = trace(model, [responses[:3], responses[3:]], config)
    expected = dense_scores(responses, gradients, config)
    assert all(row.scored for row in rows.values())
    found = torch.cat([rows[r.row_id].scores for r in responses])
    assert found.dtype == torch.float64
    assert relative_error(found, torch.cat([expected[r.row_id] for r in responses])) <= tolerance


@pytest.mark.filterwarnings("ignore::influence.config.InfluenceWarning")
@pytest.mark.parametrize(
    ("hessian", "scope", "contrast", "exclude_self", "damping_mode"),
    [
        pytest.param(*values, id="-".join(map(str, values)))
        for values in product(
            ("response", "identity", "token"),
            ("per_prompt", "batch"),
            ("none", "accepted_minus_rejected", "advantage"),
            (True, False),
            ("trace_over_responses", "trace_over_dim"),
        )
        if values[0] != "identity" or values[4] == "trace_over_responses"
    ],
)
def test_scores_are_those_of_the_dense_solve(
    hessian: str,
    scope: str,
    contrast: str,
    exclude_self: bool,
    damping_mode: str,
    gradients: PositionGradients,
) -> None:
    # Factor 2 gives systems with more dimensions than responses (gate, up, down) and with fewer (k, v).
    config = TracerConfig(
        hessian=hessian,
        scope=scope,
        contrast=contrast,
        exclude_self=exclude_self,
        damping_mode=damping_mode,
        projection_dim_factor=2,
    )
    assert_same_scores(config, gradients, TinyTransformer())


@pytest.mark.parametrize("factor", [1, 3, 256])
def test_every_projection_width(factor: int, gradients: PositionGradients) -> None:
    assert_same_scores(TracerConfig(projection_dim_factor=factor), gradients, TinyTransformer())


@pytest.mark.filterwarnings("ignore:.*max_hessian_dim:influence.config.InfluenceWarning")
def test_widths_shrunk_to_max_hessian_dim(gradients: PositionGradients) -> None:
    config = TracerConfig(hessian="token", projection_dim_factor=1, max_hessian_dim=9)
    assert {g[0].shape[1] for g in projected(gradients, config).values()} <= set(range(1, 10))
    assert_same_scores(config, gradients, TinyTransformer())


def test_a_module_that_runs_twice_counts_both_times() -> None:
    twice = position_gradients(TinyTransformer(num_passes=2), RESPONSES, DEFAULT_MODULES)
    assert_same_scores(TracerConfig(projection_dim_factor=2), twice, TinyTransformer(num_passes=2))


def test_float32_model_agrees_to_float32(gradients: PositionGradients) -> None:
    responses = RESPONSES
    config = TracerConfig(projection_dim_factor=2)
    rows = trace(TinyTransformer(dtype=torch.float32), [responses], config)
    expected = dense_scores(responses, gradients, config)
    found = torch.cat([rows[r.row_id].scores for r in responses])
    assert found.dtype == torch.float32
    assert relative_error(found.double(), torch.cat([expected[r.row_id] for r in responses])) < 1e-4
