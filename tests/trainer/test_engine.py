"""The engine in verl's own training worker: its scores are those of plain autograd on the plain model.

Real verl (FSDP, micro-batching, loss, optimizer, metrics), one process a rank, no Ray and no rollout.
"""

from __future__ import annotations

from typing import Any

import pytest

from influence.rundir import load_step
from tests.trainer.engine_runs import Outcome, assert_scores_by_hand, run_scenarios

pytestmark = pytest.mark.slow

# Between them: padded and packed, fixed and dynamic micro-batches, with and without checkpointing, one and
# several mini-batches and epochs, both objectives, all contrasts, a tool's tokens, padding rows. FSDP2 only:
# torch's FSDP1 does not run on a CPU.
SCENARIOS: dict[str, dict[str, Any]] = {
    "padded": {
        "num_ranks": 1, "packed": False, "dynamic": False, "checkpointing": False, "compare": True,
        "learning_rate": 1e-3, "with_tool": True,
    },
    "packed": {
        "num_ranks": 1, "packed": True, "dynamic": True, "checkpointing": True, "compare": True,
        "learning_rate": 1e-3, "epochs": 2,
        "influence": {"influence__contrast": "none", "influence__objective": "log_prob",
                      "influence__max_tokens_per_response": 4},
    },
    "leave-one-out": {
        "num_ranks": 1, "packed": True, "dynamic": False, "checkpointing": True,
        "influence": {"influence__exclude_self": True, "influence__damping_mode": "trace_over_responses"},
    },
    "two-ranks-padded": {
        "num_ranks": 2, "packed": False, "dynamic": False, "checkpointing": True, "compare": True,
        "learning_rate": 1e-3, "with_padding": True, "influence": {"influence__contrast": "advantage"},
    },
    "two-ranks-packed": {
        "num_ranks": 2, "packed": True, "dynamic": True, "checkpointing": False, "num_mini_batches": 2,
        "epochs": 2,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return run_scenarios(SCENARIOS, tmp_path_factory.mktemp("engine"))


@pytest.fixture(params=SCENARIOS)
def outcome(request: pytest.FixtureRequest, outcomes: dict[str, Outcome]) -> Outcome:
    return outcomes[request.param]


def test_scores_are_those_of_the_plain_model(outcome: Outcome) -> None:
    assert_scores_by_hand(outcome)
    num_ranks = outcome.scenario["num_ranks"]
    ranks_of_prompt: dict[int, set[int]] = {}
    for place, row in enumerate(outcome.scenario["rows"]):
        ranks_of_prompt.setdefault(row["prompt_index"], set()).add(place % num_ranks)
    assert any(len(ranks) == num_ranks for ranks in ranks_of_prompt.values())


def test_columns_are_those_of_the_responses(outcome: Outcome) -> None:
    arrays, config = outcome.arrays, outcome.config
    rows = {(r["prompt_index"], r["session_id"]): r for r in outcome.scenario["rows"]}
    cap = config.max_tokens_per_response
    for r in range(arrays.num_rows):
        row = rows[int(arrays.prompt_index[r]), int(arrays.session_id[r])]
        span = slice(arrays.row_offsets[r], arrays.row_offsets[r + 1])
        own = [token for token, is_own in enumerate(row["mask"]) if is_own]
        places = own if arrays.positions is None else arrays.positions[span].tolist()
        assert len(places) == (len(own) if cap < 0 else min(cap, len(own)))
        assert set(places) <= set(own)
        assert arrays.token_ids[span].tolist() == [row["response"][place] for place in places]
        assert arrays.response_length[r] == len(row["response"])
        assert (arrays.reward[r], arrays.uid[r]) == (row["reward"], row["uid"])
    if cap < 0 and not outcome.scenario.get("with_tool"):
        assert arrays.positions is None


def test_metrics_are_sums_over_ranks_reported_once(outcome: Outcome) -> None:
    metrics = outcome.result["traced"]["metrics"]
    arrays = outcome.arrays
    assert metrics["actor/influence_trace/rows_emitted"] == arrays.num_rows
    assert metrics["actor/influence_trace/captured_tokens"] == arrays.num_positions
    assert metrics["actor/influence_trace/groups"] == 4
    assert metrics["actor/influence_trace/skipped_groups"] == 0
    ways = [metrics[f"actor/influence_trace/{way}_fraction"] for way in ("fused", "shared", "separate")]
    assert ways == [0, 1, 0]  # the old log-probabilities are made up: every micro-batch falls back
    num_fallbacks = metrics["actor/influence_trace/fallback_off_policy"]
    assert num_fallbacks == metrics["actor/influence_trace/micro_batches"]
    phases = ["grad_staging", "hessian_solve", "token_scoring", "score_aggregation", "other"]
    timings = load_step(outcome.paths.root_dir, 1).record.timings
    for phase in (*phases, "pop_rows", "capture", "forward_1", "logprob_backward", "forward_2"):
        assert metrics[f"actor/timing_s/influence_{phase}"] == pytest.approx(timings[phase])
        assert timings[phase] >= 0
    if outcome.scenario["num_ranks"] == 1:
        assert timings["pop_rows"] == pytest.approx(sum(timings[phase] for phase in phases))
    assert timings["update_actor"] > timings["capture"] + timings["pop_rows"]


def test_training_is_bitwise_what_it_is_without_tracing(outcomes: dict[str, Outcome]) -> None:
    import torch

    compared = [outcome for outcome in outcomes.values() if outcome.scenario["compare"]]
    assert len(compared) == 3
    for outcome in compared:
        traced, stock = outcome.result["traced"], outcome.result["stock"]
        changed = 0
        for name, weight in stock["weights"].items():
            assert torch.equal(traced["weights"][name], weight), name
            changed += 1
        assert changed > 10
        assert torch.equal(traced["random"], stock["random"])
        assert traced["gradients_left"] == stock["gradients_left"]
        for name in ("actor/loss", "actor/grad_norm", "actor/pg_loss"):
            assert traced["metrics"][name] == stock["metrics"][name]
        assert not [name for name in stock["metrics"] if "influence" in name]
