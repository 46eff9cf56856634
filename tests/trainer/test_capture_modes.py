"""Every way to capture, in verl's own training worker: same scores, same training, and the reason when one
is not exact.

The scores are compared with those of plain autograd on the plain model, one sequence at a time, so that no
two of our own ways can agree on a wrong number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from influence.verl_engine.fused import REASONS
from tests.trainer.engine_runs import Outcome, assert_scores_by_hand, run_scenarios

pytestmark = pytest.mark.slow

AGGREGATIONS = (
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm",
)  # fmt: skip
LEAVE_ONE_OUT = {"influence__exclude_self": True, "influence__damping_mode": "trace_over_responses"}
# A few rows of each mini-batch of 16; where ranks are 4, they lie on ranks 0 and 1.
OFF_POLICY_ROW = {4: {"old_log_probs": -4.0}}


def scenario(capture: str, num_ranks: int = 1, *, influence: Any = None, **settings: Any) -> dict[str, Any]:
    """On policy, packed and dynamic with checkpointing, unless the settings say otherwise."""
    layout = {"packed": True, "dynamic": True, "checkpointing": True, "on_policy": True}
    options = {"influence__contrast": "advantage", **LEAVE_ONE_OUT, **(influence or {})}
    return {
        **layout, **settings, "num_ranks": num_ranks, "influence": {**options, "influence__capture": capture},
    }  # fmt: skip


PADDED = {"packed": False, "dynamic": False, "checkpointing": False}

ON_POLICY = {
    **{
        f"fused-{aggregation}-{num_ranks}": scenario(
            "fused",
            num_ranks,
            actor={"loss_agg_mode": aggregation},
            # With the other curvature, scores do not see a factor that all rows have in common.
            influence={"influence__hessian": "identity"} if num_ranks > 1 else None,
            **(PADDED if place % 2 else {}),
        )
        for num_ranks in (1, 2, 4)
        for place, aggregation in enumerate(AGGREGATIONS)
    },
    **{f"shared-{num_ranks}": scenario("shared", num_ranks) for num_ranks in (1, 2, 4)},
    **{f"separate-{num_ranks}": scenario("separate", num_ranks) for num_ranks in (1, 2, 4)},
    "auto-2": scenario("auto", 2, with_tool=True, with_padding=True),
    "log-prob": scenario("auto", 1, influence={"influence__objective": "log_prob"}),
    "epochs": scenario("auto", 1, epochs=2, learning_rate=1e-2),
    "mean-ratio": scenario("auto", 1, influence={"influence__contrast": "mean_ratio"}),
    "all-positions": scenario(
        "auto", 2, influence={"influence__positions": "all"}, with_tool=True, with_padding=True
    ),
    "all-positions-padded": scenario(
        "separate",
        1,
        influence={"influence__positions": "all", "influence__max_tokens_per_response": 5},
        **PADDED,
    ),
    "lora": scenario("fused", 2, lora=True, influence={"influence__modules": ["lora_A.*", "lora_B.*"]}),
    "lora-shared": scenario(
        "shared", 1, lora=True, influence={"influence__modules": ["lora_A.*", "lora_B.*"]}
    ),
}
"""Exact in every micro-batch."""

OFF_POLICY = {
    "mixed-1": (scenario("auto", 1, changed_rows=OFF_POLICY_ROW, **PADDED), "off_policy"),
    # Rank 0's first micro-batch is off policy; the other ranks must go along.
    "mixed-2": (scenario("auto", 2, changed_rows=OFF_POLICY_ROW), "off_policy"),
    "mixed-4": (scenario("auto", 4, changed_rows=OFF_POLICY_ROW, **PADDED), "off_policy"),
    "stand-in": (
        scenario("auto", 4, changed_rows={0: {"old_log_probs": -4.0}}, with_padding=True, in_place=True,
        **PADDED), "off_policy",
    ),
    "all": (scenario("auto", 1, on_policy=False), "off_policy"),
    "all-mean-ratio": (
        scenario("auto", 1, on_policy=False, influence={"influence__contrast": "mean_ratio"}),
        "off_policy",
    ),
    "entropy": (scenario("auto", 1, actor={"entropy_coeff": 0.01}, calculate_entropy=True), "entropy"),
    "kl-loss": (scenario("auto", 1, actor={"use_kl_loss": True, "kl_loss_coef": 0.1}), "loss_terms"),
    "no-advantage": (
        scenario(
            "auto", 1, changed_rows={3: {"advantage": 0.0}}, influence={"influence__objective": "log_prob"},
            **PADDED,
        ),
        "zero_advantage",
    ),
    "in-place": (scenario("auto", 2, changed_rows=OFF_POLICY_ROW, in_place=True), "off_policy"),
}  # fmt: skip
"""Not exact in some micro-batch, for this reason."""

UPDATED = {
    # With the second of two mini-batches the policy is no longer the one that generated the rows.
    f"updated-{capture}": scenario(capture, 1, num_mini_batches=2, learning_rate=1e-2, **PADDED)
    for capture in ("auto", "separate")
}
LOSS = {
    f"loss-{capture}": scenario(
        capture, 1, influence={"influence__objective": "training_loss", "influence__hessian": "identity"}
    )
    for capture in ("auto", "shared", "separate")
}
COMPARED = {
    f"compared-{capture}": scenario(
        capture, 1, compare=True, learning_rate=1e-3, num_mini_batches=2, changed_rows=OFF_POLICY_ROW,
        epochs=2, actor={"entropy_coeff": entropy}, calculate_entropy=entropy > 0, in_place=in_place,
        with_padding=True,
    )
    for capture, entropy, in_place in (("auto", 0.0, False), ("shared", 0.01, False), ("separate", 0.01,
    True))
} | {
    "compared-fused": scenario("fused", 1, compare=True, learning_rate=1e-3, epochs=2),
    "compared-in-place": scenario(
        "auto", 2, compare=True, learning_rate=1e-3, changed_rows=OFF_POLICY_ROW, in_place=True
    ),
    "compared-fused-2": scenario("fused", 2, compare=True, learning_rate=1e-3, **PADDED),
    "compared-shared-2": scenario("shared", 2, compare=True, learning_rate=1e-3, **PADDED),
}  # fmt: skip
REFUSED = {
    "refused-fused": scenario("fused", 2, changed_rows=OFF_POLICY_ROW),
    "refused-shared": scenario("shared", 1, in_place=True),
}
SCENARIOS = ON_POLICY | {name: s for name, (s, _) in OFF_POLICY.items()} | UPDATED | LOSS | COMPARED | REFUSED


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return run_scenarios(SCENARIOS, tmp_path_factory.mktemp("modes"))


def fractions(outcome: Outcome) -> dict[str, float]:
    return {way: outcome.metric(f"{way}_fraction") for way in ("fused", "shared", "separate")}


def fallbacks(outcome: Outcome) -> dict[str, float]:
    counts = {reason: outcome.metric(f"fallback_{reason}") for reason in (*REASONS, "in_place_cross_entropy")}
    return {reason: count for reason, count in counts.items() if count}


@pytest.mark.parametrize("name", ON_POLICY)
def test_every_way_gives_the_scores_of_plain_autograd(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    assert_scores_by_hand(outcome)
    capture = outcome.config.capture
    way = "fused" if capture == "auto" else capture
    assert fractions(outcome) == {"fused": 0, "shared": 0, "separate": 0} | {way: 1}
    assert outcome.metric("on_policy_fraction") == 1
    assert not fallbacks(outcome)
    metrics = outcome.result["traced"]["metrics"]
    phases = ("forward_1", "logprob_backward", "forward_2", "loss_backward", "capture")
    timings = {phase: metrics[f"actor/timing_s/influence_{phase}"] for phase in phases}
    assert (timings["forward_1"] > 0) == (way == "separate")
    assert (timings["logprob_backward"] > 0) == (way != "fused")
    assert timings["capture"] >= timings["forward_1"] + timings["logprob_backward"]
    assert min(timings["forward_2"], timings["loss_backward"]) > 0


@pytest.mark.parametrize("name", OFF_POLICY)
def test_auto_falls_back_where_fused_is_inexact_and_says_why(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome, (settings, reason) = outcomes[name], OFF_POLICY[name]
    assert_scores_by_hand(outcome)
    in_place = settings.get("in_place", False)
    assert set(fallbacks(outcome)) == {reason} | ({"in_place_cross_entropy"} if in_place else set())
    ways = fractions(outcome)
    assert sum(ways.values()) == pytest.approx(1)
    assert ways["separate" if in_place else "shared"] > 0
    assert ways["shared" if in_place else "separate"] == 0


def test_only_the_micro_batch_that_is_inexact_falls_back(outcomes: dict[str, Outcome]) -> None:
    mixed = outcomes["mixed-1"]  # 8 micro-batches of 2 rows, one of them with a row that is off policy
    assert fractions(mixed) == {"fused": 14 / 16, "shared": 2 / 16, "separate": 0}
    assert fallbacks(mixed) == {"off_policy": 1}
    assert mixed.metric("on_policy_fraction") == 15 / 16
    # One of 4 ranks falls back in one of its 2 micro-batches, and the others with it.
    assert fractions(outcomes["mixed-4"]) == {"fused": 0.5, "shared": 0.5, "separate": 0}
    assert fallbacks(outcomes["mixed-4"]) == {"off_policy": 1}
    assert fractions(outcomes["all"])["fused"] == 0
    assert outcomes["all"].metric("on_policy_fraction") == 0
    assert outcomes["entropy"].metric("on_policy_fraction") == 1


def test_after_an_update_auto_falls_back_and_agrees_with_separate(outcomes: dict[str, Outcome]) -> None:
    auto, separate = outcomes["updated-auto"], outcomes["updated-separate"]
    assert fractions(auto) == {"fused": 0.5, "shared": 0.5, "separate": 0}
    assert fallbacks(auto) == {"off_policy": 4}
    assert auto.metric("on_policy_fraction") == separate.metric("on_policy_fraction") == 0.5
    scale = np.abs(separate.arrays.scores).max()
    np.testing.assert_allclose(auto.arrays.scores, separate.arrays.scores, rtol=0, atol=3e-6 * scale)
    # The update changed the second half's scores far more than that: the test can fail.
    at_first = outcomes["separate-1"].arrays.scores
    assert np.abs(at_first - separate.arrays.scores).max() > 1e-2 * scale


def test_the_training_loss_is_traced_as_verl_differentiates_it(outcomes: dict[str, Outcome]) -> None:
    rows = outcomes["loss-auto"].scenario["rows"]
    num_tokens = sum(sum(row["mask"]) for row in rows)
    for name in LOSS:
        outcome = outcomes[name]
        # At ratio 1 verl's token-mean loss has the gradient of -A log pi, divided by the number of tokens.
        outcome.scenario["objective_factor"] = -1.0 / num_tokens
        assert_scores_by_hand(outcome)
    assert fractions(outcomes["loss-auto"])["fused"] == 1


@pytest.mark.parametrize("name", COMPARED)
def test_training_is_bitwise_what_it_is_without_tracing(name: str, outcomes: dict[str, Outcome]) -> None:
    import torch

    traced, stock = outcomes[name].result["traced"], outcomes[name].result["stock"]
    assert len(stock["weights"]) > 10
    for weight, tensor in stock["weights"].items():
        assert torch.equal(traced["weights"][weight], tensor), weight
    assert torch.equal(traced["random"], stock["random"])
    assert traced["gradients_left"] == stock["gradients_left"]
    shared = [metric for metric in stock["metrics"] if not metric.startswith("actor/perf")]
    assert len(shared) > 5
    for metric in shared:
        assert traced["metrics"][metric] == stock["metrics"][metric], metric


def test_prompt_positions_are_negative_and_their_tokens_the_prompts(outcomes: dict[str, Outcome]) -> None:
    for name in ("all-positions", "all-positions-padded"):
        outcome = outcomes[name]
        arrays = outcome.arrays
        rows = {(r["prompt_index"], r["session_id"]): r for r in outcome.scenario["rows"]}
        assert arrays.positions is not None
        assert arrays.log_probs is not None
        for r in range(arrays.num_rows):
            row = rows[int(arrays.prompt_index[r]), int(arrays.session_id[r])]
            span = slice(arrays.row_offsets[r], arrays.row_offsets[r + 1])
            places = arrays.positions[span].tolist()
            first, last = 1 - len(row["prompt"]), len(row["response"]) - 1
            if outcome.config.max_tokens_per_response < 0:
                assert places == list(range(first, last + 1))
            assert set(places) <= set(range(first, last + 1))
            sequence = row["prompt"] + row["response"]
            predicted = [sequence[len(row["prompt"]) + place] for place in places]
            assert arrays.token_ids is not None
            assert arrays.token_ids[span].tolist() == predicted
            assert np.isnan(arrays.log_probs[span]).tolist() == [place < 0 for place in places]
        assert np.isfinite(arrays.scores).all()
        assert (arrays.positions < 0).sum() > 20
        assert np.abs(arrays.scores[arrays.positions < 0]).max() > 0.01
        assert arrays.advantages is not None
        assert len(arrays.advantages) == arrays.num_rows


def test_a_way_that_would_be_wrong_is_refused_by_every_rank(outcomes: dict[str, Outcome]) -> None:
    errors = outcomes["refused-fused"].result["errors"]
    assert len(errors) == 2
    assert sum("not exact in this micro-batch (off_policy)" in error for error in errors) == 1
    assert all("capture: auto" in error for error in errors)
    (shared,) = outcomes["refused-shared"].result["errors"]
    assert "capture: shared would give wrong scores" in shared
