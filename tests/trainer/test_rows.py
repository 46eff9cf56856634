"""Which token of verl's batches belongs to which row, checked against loops over sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from influence.verl_engine.rows import (
    as_model_grid,
    packed_row_ids,
    packed_weights,
    predicting_positions,
    read_rows,
)


@dataclass
class Sequence:
    prompt: list[int]
    response: list[int]
    mask: list[int]
    advantages: list[float]


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    num_prompt, num_response = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    tokens = st.integers(0, 50)
    return Sequence(
        draw(st.lists(tokens, min_size=num_prompt, max_size=num_prompt)),
        draw(st.lists(tokens, min_size=num_response, max_size=num_response)),
        draw(st.lists(st.integers(0, 1), min_size=num_response, max_size=num_response)),
        draw(st.lists(st.floats(-2, 2, width=32), min_size=num_response, max_size=num_response)),
    )


batches = st.lists(sequences(), min_size=1, max_size=5)


def jagged(rows: list[list[Any]], dtype: torch.dtype) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.tensor(row, dtype=dtype) for row in rows], layout=torch.jagged)


def as_data(batch: list[Sequence]) -> dict[str, Any]:
    return {
        "input_ids": jagged([s.prompt + s.response for s in batch], torch.int64),
        "prompts": jagged([s.prompt for s in batch], torch.int64),
        "responses": jagged([s.response for s in batch], torch.int64),
        "response_mask": jagged([s.mask for s in batch], torch.int64),
        "advantages": jagged([s.advantages for s in batch], torch.float32),
    }


@given(batches)
@settings(max_examples=40, deadline=None)
def test_a_token_is_predicted_one_position_before_it(batch: list[Sequence]) -> None:
    data = as_data(batch)
    packed = data["input_ids"].values()
    predicted = packed[predicting_positions(data) + 1]
    assert predicted.tolist() == [token for s in batch for token in s.response]


@given(batches)
@settings(max_examples=40, deadline=None)
def test_row_ids_mark_the_policys_own_tokens_in_both_layouts(batch: list[Sequence]) -> None:
    data = as_data(batch)
    ids = [10 + b if b != 1 else -1 for b in range(len(batch))]  # the second row is padding
    packed = packed_row_ids(data, ids)

    expected = []
    for row_id, s in zip(ids, batch, strict=True):
        row = [-1] * (len(s.prompt) + len(s.response))
        for token, is_own in enumerate(s.mask):
            if is_own:
                row[len(s.prompt) - 1 + token] = row_id
        expected.append(row)
    assert packed.tolist() == [value for row in expected for value in row]

    longest = max(map(len, expected))
    if len(batch) > 1:
        padded = as_model_grid(packed, data, (len(batch), longest))
        assert padded.tolist() == [row + [-1] * (longest - len(row)) for row in expected]
    one_row = as_model_grid(packed, data, (1, packed.numel() + 3))
    assert one_row.tolist() == [[*packed.tolist(), -1, -1, -1]]


@given(batches)
@settings(max_examples=40, deadline=None)
def test_all_positions_are_those_before_a_sequences_last(batch: list[Sequence]) -> None:
    data = as_data(batch)
    ids = [10 + b if b != 1 else -1 for b in range(len(batch))]
    expected = []
    for row_id, s in zip(ids, batch, strict=True):
        row = [row_id if any(s.mask) else -1] * (len(s.prompt) + len(s.response) - 1)
        expected += [*row, -1]
    assert packed_row_ids(data, ids, "all").tolist() == expected


def test_a_grid_that_cannot_hold_the_tokens_is_refused() -> None:
    data = as_data([Sequence([1], [2, 3], [1, 1], [0, 0]), Sequence([1], [2], [1], [0])])
    packed = packed_row_ids(data, [0, 1])
    for grid in [(2, 2), (3, 3), (1, 4)]:
        with pytest.raises(ValueError, match="does not hold"):
            as_model_grid(packed, data, grid)


@given(batches)
@settings(max_examples=40, deadline=None)
def test_the_objective_weights_each_log_prob_where_it_is_computed(batch: list[Sequence]) -> None:
    data = as_data(batch)
    log_probs = torch.randn(data["input_ids"].values().numel(), dtype=torch.float64)
    expected = {"log_prob": 0.0, "log_prob_advantage": 0.0}
    place = 0
    for s in batch:
        for token, (is_own, advantage) in enumerate(zip(s.mask, s.advantages, strict=True)):
            log_prob = float(log_probs[place + len(s.prompt) - 1 + token])
            expected["log_prob"] += is_own * log_prob
            expected["log_prob_advantage"] += is_own * advantage * log_prob
        place += len(s.prompt) + len(s.response)
    for objective, value in expected.items():
        got = float((packed_weights(data, objective).double() * log_probs).sum())
        assert got == pytest.approx(value, abs=1e-5)


def test_rows_are_read_from_whatever_holds_a_column() -> None:
    batch = [Sequence([1, 2], [3, 4], [1, 0], [0.5, 0.5]), Sequence([5], [6], [1], [-1.0])]
    data = as_data(batch) | {
        "old_log_probs": jagged([[-0.1, -0.2], [-0.3]], torch.float32),
        "rm_scores": jagged([[0.0, 1.0], [0.25]], torch.float32),
        "uid": ["000001-000004", "padabc"],
        "index": torch.tensor([7, 0]),
        "session_id": [2, 0],
    }
    first, second = read_rows(data)
    assert (first.key, first.prompt_index, first.reward) == (("000001-000004", 2), 7, 1.0)
    assert (first.token_ids.tolist(), first.mask.tolist()) == ([3, 4], [True, False])
    assert first.prompt_ids.tolist() == [1, 2]
    assert first.positions("response").tolist() == [0]
    assert first.positions("all").tolist() == [-1, 0, 1]
    assert first.log_probs.tolist() == pytest.approx([-0.1, -0.2])
    assert not first.is_padding
    assert second.is_padding
