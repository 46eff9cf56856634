"""The tracer with the reference run's settings against a second implementation of them, on random inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from influence import InfluenceTracer, TracerConfig
from influence.score import RowScores
from tests.influence.reference_run import ReferenceResponse, reference_scores
from tests.influence.separate_layers import SeparateLayers

# Projected to 2 x 3, 1 x 2, ..., so that there are more dimensions than responses and fewer.
WIDTHS = {
    "layers.0.self_attn.q_proj": (600, 800),
    "layers.0.self_attn.k_proj": (600, 256),
    "layers.0.self_attn.v_proj": (256, 300),
    "layers.0.self_attn.o_proj": (300, 520),
    "layers.1.mlp.gate_proj": (1030, 800),
    "layers.1.mlp.up_proj": (511, 200),
    "layers.1.mlp.down_proj": (800, 600),
}

pytestmark = pytest.mark.filterwarnings("ignore::influence.config.InfluenceWarning")


MODEL = SeparateLayers(WIDTHS)


def draw(prompts: list[int], accepted: list[bool], seed: int) -> list[ReferenceResponse]:
    generator = np.random.default_rng(seed)
    responses = []
    for prompt, is_accepted in zip(prompts, accepted, strict=True):
        num_tokens = int(generator.integers(1, 5))
        inputs = {name: generator.normal(size=(num_tokens, d_in)) for name, (d_in, _) in WIDTHS.items()}
        deltas = {name: generator.normal(size=(num_tokens, d_out)) for name, (_, d_out) in WIDTHS.items()}
        responses.append(ReferenceResponse(prompt, is_accepted, inputs, deltas))
    return responses


def traced(responses: list[ReferenceResponse], config: TracerConfig) -> list[RowScores]:
    """All responses packed into one micro-batch."""
    tracer = InfluenceTracer(MODEL, config)
    row_ids = [row for row, r in enumerate(responses) for _ in next(iter(r.inputs.values()))]
    packed = [
        {
            name: torch.from_numpy(np.concatenate([column[name] for column in columns]))[None]
            for name in WIDTHS
        }
        for columns in ([r.inputs for r in responses], [r.output_gradients for r in responses])
    ]
    with tracer.capture(torch.tensor([row_ids])):
        MODEL.objective(*packed).backward()
    rows = tracer.pop_rows([r.prompt for r in responses], [1.0 if r.is_accepted else -1.0 for r in responses])
    tracer.remove()
    return rows


def assert_agreement(responses: list[ReferenceResponse], config: TracerConfig) -> None:
    expected = reference_scores(responses)
    scale = max((float(np.abs(scores).max()) for scores in expected if scores is not None), default=1.0)
    for row, scores in zip(traced(responses, config), expected, strict=True):
        assert row.scored == (scores is not None)
        wanted = np.zeros(len(row.scores)) if scores is None else scores
        assert np.abs(row.scores.numpy() - wanted).max() <= 1e-9 * scale


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=2, max_size=12), st.integers(0, 999))
def test_scores_are_those_of_the_reference_run(rows: list[tuple[int, bool]], seed: int) -> None:
    responses = draw([prompt for prompt, _ in rows], [accepted for _, accepted in rows], seed)
    assert_agreement(responses, TracerConfig.reference_run())


@pytest.mark.parametrize(
    "change",
    [
        {"contrast": "none", "exclude_self": True},
        {"damping_mode": "trace_over_responses"},
        {"scope": "batch"},
        {"hessian": "identity"},
        {"hessian": "token"},
        {"damping": 0.2},
        {"projection_dim_factor": 128},
        {"seed": 1},
    ],
    ids=str,
)
def test_any_other_setting_gives_other_scores(change: dict[str, object]) -> None:
    responses = draw([0, 0, 0, 1, 1, 1], [True, False, True, False, True, True], seed=7)
    assert_agreement(responses, TracerConfig.reference_run())
    config = TracerConfig.from_mapping({**TracerConfig.reference_run().to_mapping(), **change})
    with pytest.raises(AssertionError):
        assert_agreement(responses, config)
