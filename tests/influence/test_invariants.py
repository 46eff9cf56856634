"""What holds for any factors and any settings, on random layers, tokens and groups."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from influence import InfluenceTracer, TracerConfig
from influence.score import RowScores
from tests.influence.separate_layers import SeparateLayers

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPES = ((6, 6), (6, 2), (6, 2), (6, 6), (6, 9), (6, 9), (9, 6))
MODEL = SeparateLayers({f"layers.0.{name}": shape for name, shape in zip(NAMES, SHAPES, strict=True)})

pytestmark = pytest.mark.filterwarnings("ignore::influence.config.InfluenceWarning")

CONFIGS = st.builds(
    TracerConfig,
    objective=st.just("log_prob"),
    hessian=st.sampled_from(["response", "identity", "token"]),
    scope=st.sampled_from(["per_prompt", "batch"]),
    exclude_self=st.booleans(),
    damping=st.floats(0.01, 10),
    damping_mode=st.sampled_from(["trace_over_responses", "trace_over_dim"]),
    projection_dim_factor=st.integers(1, 4),
)


@dataclass(frozen=True)
class Tokens:
    """A packed grid of N tokens, each of one of the rows or of none."""

    row_ids: list[int]
    groups: list[int]
    contrast: list[float]
    inputs: dict[str, Tensor]
    output_gradients: dict[str, Tensor]

    def reordered(self, order: list[int]) -> Tokens:
        """Token i of the result is token order[i] of this."""
        return Tokens(
            [self.row_ids[token] for token in order],
            self.groups,
            self.contrast,
            {name: x[:, order] for name, x in self.inputs.items()},
            {name: x[:, order] for name, x in self.output_gradients.items()},
        )

    def of_row(self, row: int) -> list[int]:
        return [token for token, of in enumerate(self.row_ids) if of == row]


@st.composite
def token_grids(draw: st.DrawFn) -> Tokens:
    num_rows = draw(st.integers(1, 6))
    more = draw(st.lists(st.integers(-1, num_rows - 1), max_size=20))
    row_ids = draw(st.permutations([*range(num_rows), *more]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def normal(width: int) -> Tensor:
        return torch.randn(1, len(row_ids), width, dtype=torch.float64, generator=generator)

    return Tokens(
        row_ids,
        draw(st.lists(st.integers(0, 1), min_size=num_rows, max_size=num_rows)),
        draw(st.lists(st.sampled_from([-1.0, 0.0, 1.0, 0.5]), min_size=num_rows, max_size=num_rows)),
        {f"layers.0.{name}": normal(d_in) for name, (d_in, _) in zip(NAMES, SHAPES, strict=True)},
        {f"layers.0.{name}": normal(d_out) for name, (_, d_out) in zip(NAMES, SHAPES, strict=True)},
    )


def traced(tokens: Tokens, config: TracerConfig) -> list[RowScores]:
    tracer = InfluenceTracer(MODEL, config)
    with tracer.capture(torch.tensor([tokens.row_ids])):
        MODEL.objective(tokens.inputs, tokens.output_gradients).backward()
    rows = tracer.pop_rows(tokens.groups, tokens.contrast)
    tracer.remove()
    return rows


def close(found: Tensor, expected: Tensor, scale: float) -> bool:
    return float((found - expected).abs().max()) <= 1e-9 * scale


@settings(max_examples=60, deadline=None)
@given(token_grids(), CONFIGS)
def test_the_scores_of_a_row_add_up_to_its_total(tokens: Tokens, config: TracerConfig) -> None:
    rows = traced(tokens, config)
    for row in rows:
        size = max(float(row.scores.abs().sum()), 1e-300)
        assert float(row.scores.sum()) == pytest.approx(row.total, abs=1e-9 * size)


@settings(max_examples=60, deadline=None)
@given(st.data(), token_grids(), CONFIGS)
def test_scores_go_with_their_tokens(data: st.DataObject, tokens: Tokens, config: TracerConfig) -> None:
    order = data.draw(st.permutations(range(len(tokens.row_ids))))
    plain, moved = traced(tokens, config), traced(tokens.reordered(order), config)
    scale = max((float(row.scores.abs().max()) for row in plain), default=0.0)
    for before, after in zip(plain, moved, strict=True):
        by_token = dict(zip(tokens.of_row(before.row_id), before.scores.tolist(), strict=True))
        places = tokens.reordered(order).of_row(before.row_id)
        expected = torch.tensor([by_token[order[place]] for place in places], dtype=torch.float64)
        assert close(after.scores, expected, scale)


@settings(max_examples=60, deadline=None)
@given(st.data(), token_grids(), CONFIGS)
def test_scores_go_with_their_rows(data: st.DataObject, tokens: Tokens, config: TracerConfig) -> None:
    names = data.draw(st.permutations(range(len(tokens.groups))))
    renamed = Tokens(
        [names[row] if row >= 0 else -1 for row in tokens.row_ids],
        [tokens.groups[names.index(row)] for row in range(len(names))],
        [tokens.contrast[names.index(row)] for row in range(len(names))],
        tokens.inputs,
        tokens.output_gradients,
    )
    plain, moved = traced(tokens, config), traced(renamed, config)
    scale = max((float(row.scores.abs().max()) for row in plain), default=0.0)
    for row in plain:
        same = moved[names[row.row_id]]
        assert same.scored == row.scored
        assert close(same.scores, row.scores, scale)
