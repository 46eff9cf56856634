"""The tracer against the definition: hooks, Gram dual and downdates against autograd and a dense solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch

from influence import InfluenceTracer, TracerConfig
from influence.config import DEFAULT_MODULES
from influence.score import RowScores
from tests.influence.brute_force import PositionGradients, dense_scores, position_gradients, relative_error
from tests.influence.tiny_model import Response, TinyTransformer, make_responses, objective, padded

RESPONSES = make_responses(num_responses=7, num_groups=2)
CONTRASTS: dict[str, Callable[[Response], float]] = {
    "none": lambda r: 1.0,
    "accepted_minus_rejected": lambda r: r.contrast,
    "advantage": lambda r: r.advantage,
}


def trace(
    model: torch.nn.Module, batches: Sequence[list[Response]], config: TracerConfig
) -> dict[int, RowScores]:
    tracer = InfluenceTracer(model, config)
    for responses in batches:
        batch = padded(responses)
        with tracer.capture(batch.row_ids):
            objective(model, batch).backward()
    rows = sorted((r for responses in batches for r in responses), key=lambda r: r.row_id)
    emitted = tracer.pop_rows([r.group for r in rows], [r.contrast for r in rows])
    tracer.remove()
    return {row.row_id: row for row in emitted}


@pytest.fixture(scope="module")
def gradients() -> PositionGradients:
    return position_gradients(TinyTransformer(), RESPONSES, DEFAULT_MODULES)


@pytest.mark.filterwarnings("ignore::influence.config.InfluenceWarning")
@pytest.mark.parametrize(
    ("hessian", "scope", "contrast", "exclude_self", "damping_mode"),
    [
        pytest.param(*values, id="-".join(map(str, values)))
        for values in product(
            ("response", "identity"),
            ("per_prompt", "batch"),
            ("none", "accepted_minus_rejected", "advantage"),
            (True, False),
            ("trace_over_responses", "trace_over_dim"),
        )
        if values[0] == "response" or values[4] == "trace_over_responses"
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
    config = TracerConfig(
        hessian=hessian,
        scope=scope,
        contrast=contrast,
        exclude_self=exclude_self,
        damping_mode=damping_mode,
        projection_dim_factor=2,
    )
    responses = [replace(r, contrast=CONTRASTS[contrast](r)) for r in RESPONSES]
    model = TinyTransformer()
    rows = trace(model, [responses[:3], responses[3:]], config)
    expected = dense_scores(responses, gradients, config)
    assert all(row.scored for row in rows.values())
    assert (
        relative_error(
            torch.cat([rows[r.row_id].scores for r in responses]),
            torch.cat([expected[r.row_id] for r in responses]),
        )
        <= 1e-10
    )
