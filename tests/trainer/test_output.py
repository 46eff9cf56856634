"""From scored rows of several ranks to one step: order, groups, contrast, columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from influence.config import TracerConfig
from influence.rundir import FencedError, RunPaths, claim_attempt, load_step, read_run
from influence.score import RowScores
from influence.verl_engine.output import RunOutput, _columns, _merge, _with_fractions
from influence.verl_engine.rows import Row
from influence.verl_engine.step_rows import ScoredRow, StepRows
from tests.trainer.conftest import Spec


def row(prompt: int, session: int, *, mask: Sequence[int] = (1, 1), reward: float = 0.0, **other: Any) -> Row:
    length = len(mask)
    values: dict[str, Any] = {
        "uid": f"000001-{prompt:06d}",
        "prompt_index": 100 + prompt,
        "session_id": session,
        "reward": reward,
        "prompt_ids": np.array([90, 91, 92]),
        "mask": np.array(mask, bool),
        "token_ids": np.arange(length) + 10 * session,
        "log_probs": -np.arange(length, dtype=np.float32) - session,
        "advantages": np.full(length, reward - 0.5, np.float32),
    }
    return Row(**{**values, **other})


def scored(of: Row, positions: Sequence[int], group_id: int = 0) -> ScoredRow:
    scores = torch.tensor([of.prompt_index + of.session_id / 10 + p / 100 for p in positions])
    row_scores = RowScores(0, scores, torch.tensor(positions, dtype=torch.int64), float(scores.sum()), True)
    return ScoredRow(of, of.reward > 0, group_id, row_scores)


class FakeTracer:
    """Answers like `InfluenceTracer.pop_rows`, and remembers what it was asked."""

    def __init__(self, config: TracerConfig, row_ids: Sequence[int]) -> None:
        self.config = config
        self.row_ids = row_ids

    def pop_rows(self, groups: list[int], contrast: list[float]) -> list[RowScores]:
        self.groups, self.contrast = groups, contrast
        return [
            RowScores(i, torch.zeros(1), torch.zeros(1, dtype=torch.int64), 0.0, True) for i in self.row_ids
        ]


def test_rows_of_all_ranks_come_in_the_order_of_prompt_and_session() -> None:
    ranks = [
        [scored(row(2, 1), [0, 1], 1), scored(row(0, 0), [0, 1])],
        [scored(row(2, 0), [0, 1], 1), scored(row(0, 1, reward=1.0), [0, 1])],
    ]
    arrays = _merge([_columns(rows, "response") for rows in ranks], TracerConfig())
    assert list(zip(arrays.prompt_index, arrays.session_id, strict=True)) == [
        (100, 0), (100, 1), (102, 0), (102, 1),
    ]  # fmt: skip
    assert arrays.row_id.tolist() == [0, 1, 2, 3]
    assert arrays.group_id.tolist() == [0, 0, 1, 1]
    assert arrays.accepted.tolist() == [False, True, False, False]
    np.testing.assert_allclose(arrays.scores[:4], [100.0, 100.01, 100.1, 100.11])
    assert arrays.token_ids is not None
    assert arrays.token_ids.tolist() == [0, 1, 10, 11, 0, 1, 10, 11]
    assert arrays.positions is None
    assert arrays.advantages is not None
    np.testing.assert_allclose(arrays.advantages, [-0.5, 0.5, -0.5, -0.5])  # one a row
    swapped = _merge([_columns(rows, "response") for rows in reversed(ranks)], TracerConfig())
    np.testing.assert_array_equal(swapped.scores, arrays.scores)


def test_positions_count_in_the_response_when_tokens_were_left_out() -> None:
    capped = scored(row(0, 0, mask=(1, 1, 1, 1)), [1, 3])
    with_tool = scored(row(0, 1, mask=(1, 0, 0, 1)), [0, 1])
    arrays = _merge([_columns([capped, with_tool], "response")], TracerConfig())
    assert arrays.positions is not None
    assert arrays.positions.tolist() == [1, 3, 0, 3]
    assert arrays.token_ids is not None
    assert arrays.token_ids.tolist() == [1, 3, 10, 13]
    assert arrays.response_length.tolist() == [4, 4]


def test_prompt_positions_count_down_from_the_response() -> None:
    whole = scored(row(0, 0, mask=(1, 0), advantages=np.array([0.5, 0.5], np.float32)), [0, 1, 2, 3])
    capped = scored(row(0, 1, mask=(1, 1), advantages=np.array([0.5, 1.0], np.float32)), [0, 3])
    arrays = _merge([_columns([whole, capped], "all")], TracerConfig())
    assert arrays.positions is not None
    assert arrays.positions.tolist() == [-2, -1, 0, 1, -2, 1]
    assert arrays.token_ids is not None
    assert arrays.token_ids.tolist() == [91, 92, 0, 1, 91, 11]
    assert arrays.log_probs is not None
    np.testing.assert_array_equal(arrays.log_probs, np.array([np.nan, np.nan, 0, -1, np.nan, -2]))
    assert arrays.advantages is not None
    # A prompt has its response's advantage where that is one number, and none where it is not.
    np.testing.assert_array_equal(arrays.advantages, np.array([0.5, 0.5, 0.5, 0.5, np.nan, 1], np.float32))


def test_fractions_are_of_the_rows_of_all_ranks() -> None:
    sums = {"fused_rows": 6, "shared_rows": 2, "separate_rows": 0, "on_policy_rows": 4, "fallback_entropy": 3}
    assert _with_fractions(sums) == {
        "fused_fraction": 0.75, "shared_fraction": 0.25, "separate_fraction": 0.0, "on_policy_fraction": 0.5,
        "fallback_entropy": 3,
    }  # fmt: skip
    assert _with_fractions(dict.fromkeys(sums, 0))["fused_fraction"] == 0


def test_advantages_by_token_stay_by_token() -> None:
    by_token = scored(row(0, 0, advantages=np.array([0.25, -0.25], np.float32)), [0, 1])
    arrays = _merge([_columns([by_token, scored(row(0, 1), [0, 1])], "response")], TracerConfig())
    assert arrays.advantages is not None
    assert arrays.advantages.tolist() == [0.25, -0.25, -0.5, -0.5]


def test_a_response_without_own_tokens_has_a_row_and_no_scores() -> None:
    silent = ScoredRow(row(0, 0, mask=(0, 0)), False, 0, None)
    arrays = _merge([_columns([silent, scored(row(0, 1), [0, 1])], "response")], TracerConfig())
    assert np.diff(arrays.row_offsets).tolist() == [0, 2]
    assert arrays.scored.tolist() == [False, True]


def test_a_rank_without_rows_adds_nothing() -> None:
    arrays = _merge(
        [_columns([], "response"), _columns([scored(row(0, 0), [0, 1])], "response")], TracerConfig()
    )
    assert arrays.num_rows == 1
    assert _merge([_columns([], "response")] * 2, TracerConfig()).num_rows == 0


@pytest.mark.parametrize(
    ("contrast", "expected"),
    [
        ("none", [1, 1, 1]),
        ("accepted_minus_rejected", [1, -1, -1]),
        ("advantage", [0.5, -0.25, -0.5]),
        ("mean_ratio", [1.25, 0.75, 1.0]),
    ],
)
def test_contrasts(contrast: str, expected: list[float]) -> None:
    rows = StepRows()
    batch = [
        row(0, 0, reward=1.0),
        row(0, 1, mask=(1, 0), advantages=np.array([-0.25, 9.0], np.float32)),
        row(1, 0, reward=0.0),
    ]
    assert rows.add(batch) == [0, 1, 2]
    tracer = FakeTracer(TracerConfig(contrast=contrast), [0, 1, 2])
    rows.score(tracer, None, {0: 1.25, 1: 0.75, 2: 1.0})  # type: ignore[arg-type]
    assert tracer.contrast == expected
    assert tracer.groups == [0, 0, 1]


def test_accepted_is_above_the_threshold_not_at_it() -> None:
    rows = StepRows()
    rows.add([row(0, 0, reward=0.5), row(0, 1, reward=0.6)])
    config = TracerConfig(contrast="accepted_minus_rejected", accepted_above=0.5)
    got = rows.score(FakeTracer(config, [0, 1]), None, {})  # type: ignore[arg-type]
    assert [scored_row.accepted for scored_row in got] == [False, True]


def test_groups_are_prompts_even_where_the_data_gives_all_one_index() -> None:
    rows = StepRows()
    rows.add([row(p, s, prompt_index=0) for p in (1, 0) for s in (0, 1)])
    tracer = FakeTracer(TracerConfig(), range(4))
    rows.score(tracer, None, {})  # type: ignore[arg-type]
    assert tracer.groups == [1, 1, 0, 0]
    whole = StepRows()
    whole.add([row(p, 0) for p in range(3)])
    batch_tracer = FakeTracer(TracerConfig(scope="batch"), range(3))
    whole.score(batch_tracer, None, {})  # type: ignore[arg-type]
    assert batch_tracer.groups == [0, 0, 0]


def test_padding_and_silent_rows_are_not_captured() -> None:
    rows = StepRows()
    ids = rows.add([row(0, 0), row(0, 0, uid="padabc"), row(0, 1, mask=(0, 0))])
    assert ids == [0, -1, 2]
    tracer = FakeTracer(TracerConfig(), [0])
    got = rows.score(tracer, None, {})  # type: ignore[arg-type]
    assert len(tracer.groups) == 1
    assert [r.row.session_id for r in got] == [0, 1]
    assert got[1].scores is None


def test_later_epochs_bring_no_new_rows() -> None:
    rows = StepRows()
    first, second = [row(0, 0), row(0, 1)], [row(1, 0), row(1, 1)]
    assert rows.add(first) == [0, 1]
    assert rows.add(second) == [2, 3]
    assert rows.add([second[1], first[0]]) is None
    with pytest.raises(ValueError, match="1 of 2 rows"):
        rows.add([first[0], row(2, 0)])


def test_a_step_is_committed_and_a_fenced_attempt_commits_nothing(
    make_run: Callable[..., RunPaths], tiny_spec: Spec
) -> None:
    paths = make_run(tiny_spec)
    output = RunOutput(paths, read_run(paths), claim_attempt(paths).number)
    rows = [scored(row(0, s, reward=float(s)), [0, 1]) for s in (0, 1)]
    report = output.commit(1, rows, {"rows_emitted": 2}, {"capture": 0.5}, None)
    step = load_step(paths.root_dir, 1)
    assert step.arrays.uid == ("000001-000000", "000001-000000")
    assert step.arrays.tracer_config["projection_dim_factor"] == 256
    assert step.record.timings == {"capture": 0.5}
    assert step.record.metrics == {"rows_emitted": 2, "mean_reward": 0.5, "num_accepted": 1}
    names = report.as_verl_metrics()
    assert names["influence_trace/rows_emitted"] == 2
    assert set(names) > {"timing_s/influence_capture", "timing_s/influence_commit"}

    claim_attempt(paths)
    with pytest.raises(FencedError):
        output.commit(2, rows, {"rows_emitted": 2}, {"capture": 0.5}, None)
    assert paths.committed_step_numbers() == [1]
