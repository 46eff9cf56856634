"""When a loss can stand in for the objective, with losses written out by hand over a toy head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from influence.verl_engine.fused import Verdict, judge, measure, tolerance

ROW_IDS = [7, -1, 3]
LENGTHS = [(2, 3), (1, 2), (3, 4)]  # prompt and response
ADVANTAGES = [0.5, 2.0, -1.5]
MASK = [[1, 1, 1], [1, 1], [1, 0, 1, 1]]
EXACT = 1e-5


@dataclass
class Head:
    """A model of one weight for each of the T = 15 positions, and what verl's loss would get of it."""

    weight: Tensor
    log_probs: Tensor
    entropy: Tensor
    data: dict[str, Any]

    @property
    def output(self) -> dict[str, Tensor]:
        return {"log_probs": self.log_probs, "entropy": self.entropy}


def head(advantages: list[float] | None = None) -> Head:
    torch.manual_seed(0)
    total = sum(p + r for p, r in LENGTHS)
    weight = torch.nn.Parameter(-2 - torch.rand(total))
    offsets = torch.tensor([0, *[p + r for p, r in LENGTHS]]).cumsum(0)
    responses = [torch.arange(r) for _, r in LENGTHS]

    def nest(rows: list[Tensor]) -> Tensor:
        return torch.nested.nested_tensor(rows, layout=torch.jagged)

    log_probs = torch.nested.nested_tensor_from_jagged(weight * 1.0, offsets)
    entropy = torch.nested.nested_tensor_from_jagged(weight.exp(), offsets)
    starts = [int(offset) + p - 1 for offset, (p, _) in zip(offsets, LENGTHS, strict=False)]
    old = [weight.detach()[s : s + r] for s, (_, r) in zip(starts, LENGTHS, strict=True)]
    data = {
        "input_ids": nest([torch.arange(p + r) for p, r in LENGTHS]),
        "prompts": nest([torch.arange(p) for p, _ in LENGTHS]),
        "responses": nest(responses),
        "response_mask": nest([torch.tensor(mask) for mask in MASK]),
        "advantages": nest(
            [torch.full((r,), a) for (_, r), a in zip(LENGTHS, advantages or ADVANTAGES, strict=True)]
        ),
        "old_log_probs": nest(old),
    }
    return Head(weight, log_probs, entropy, data)


Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Of one row: log-probabilities of its response, the old ones, its mask and its advantages."""


def loss_of(toy: Head, by_row: Loss) -> Tensor:
    columns = [toy.data[name].unbind() for name in ("old_log_probs", "response_mask", "advantages")]
    total = torch.zeros(())
    for log_probs, (prompt, response), *row in zip(toy.log_probs.unbind(), LENGTHS, *columns, strict=True):
        total = total + by_row(log_probs[prompt - 1 : prompt - 1 + response], *row)
    return total


def policy(log_probs: Tensor, old: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """Clipped; the mean over the row's own tokens."""
    ratio = (log_probs - old).exp()
    clipped = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return (clipped * mask).sum() / mask.sum()


def verdict(toy: Head, loss: Tensor, objective: str = "log_prob_advantage", within: float = EXACT) -> Verdict:
    return judge(measure(loss, toy.output), toy.data, ROW_IDS, objective, within)


@pytest.mark.parametrize("objective", ["log_prob_advantage", "log_prob"])
def test_on_policy_the_scale_turns_the_losss_gradient_into_the_objectives(objective: str) -> None:
    toy = head()
    loss = loss_of(toy, policy)
    found = verdict(toy, loss, objective)
    assert found.reason is None
    assert set(found.gradient_scale) == {7, 3}
    assert found.num_on_policy == 2
    assert found.mean_ratio == pytest.approx({7: 1.0, 3: 1.0})
    (gradient,) = torch.autograd.grad(loss, toy.weight)  # measuring left the graph whole
    for row_id, row in ((7, 0), (3, 2)):
        start = sum(p + r for p, r in LENGTHS[:row])
        prompt, response = LENGTHS[row]
        scaled = gradient[start : start + prompt + response] * found.gradient_scale[row_id]
        weight = ADVANTAGES[row] if objective == "log_prob_advantage" else 1.0
        expected = [0.0] * (prompt - 1) + [weight * own for own in MASK[row]] + [0.0]
        torch.testing.assert_close(scaled, torch.tensor(expected))


def test_a_ratio_that_differs_is_off_policy_beyond_rounding_only() -> None:
    for shift, reason in ((1e-6, None), (1e-4, "off_policy"), (1.0, "off_policy")):
        toy = head()
        shifted = toy.data["old_log_probs"].values().clone()
        shifted[0] -= shift
        toy.data["old_log_probs"] = torch.nested.nested_tensor_from_jagged(
            shifted, toy.data["old_log_probs"].offsets()
        )
        found = verdict(toy, loss_of(toy, policy))
        assert found.reason == reason, shift
        assert found.num_on_policy == (2 if reason is None else 1)
        expected = (2 + torch.tensor(shift).exp().item()) / 3
        assert found.mean_ratio[7] == pytest.approx(expected, rel=1e-6)


def test_what_a_bfloat16_model_cannot_show_passes_there() -> None:
    toy = head()
    slope = loss_of(toy, lambda log_probs, *row: policy(log_probs, *row) + 1e-4 * log_probs[0])
    assert verdict(toy, slope).reason == "loss_terms"
    assert verdict(toy, slope, within=tolerance(torch.bfloat16)).reason is None
    assert tolerance(torch.float32) == EXACT


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(lambda log_probs, mask: (log_probs**2 * mask).sum(), id="another-weight-a-token"),
        pytest.param(lambda log_probs, mask: (log_probs * (1 - mask)).sum(), id="tokens-of-a-tool"),
        pytest.param(lambda log_probs, mask: (log_probs * torch.nan * mask).sum(), id="nan"),
    ],
)
def test_other_terms_on_policy_are_inexact(extra: Callable[[Tensor, Tensor], Tensor]) -> None:
    toy = head()
    loss = loss_of(toy, lambda lp, old, mask, adv: policy(lp, old, mask, adv) + extra(lp, mask))
    assert verdict(toy, loss).reason == "loss_terms"


def test_the_entropy_counts_only_where_the_loss_depends_on_it() -> None:
    for coefficient, reason in ((0.0, None), (1e-3, "entropy")):
        toy = head()
        loss = loss_of(toy, policy) - coefficient * toy.entropy.values().sum()
        assert verdict(toy, loss).reason == reason


def test_a_path_around_the_head_is_found() -> None:
    toy = head()
    assert verdict(toy, loss_of(toy, policy) + 1e-9 * toy.weight.sum()).reason == "other_path"
    assert verdict(toy, loss_of(toy, policy) + toy.weight.detach().sum()).reason is None


def test_a_row_without_advantage_is_exact_or_not_by_the_objective() -> None:
    toy = head([0.0, 1.0, 1.0])
    loss = loss_of(toy, policy)
    assert verdict(toy, loss).reason is None
    assert verdict(toy, loss).num_on_policy == 2
    assert verdict(toy, loss, "log_prob").reason == "zero_advantage"
    pulled = loss + loss_of(toy, lambda log_probs, *_row: log_probs.sum())
    assert verdict(toy, pulled).reason == "loss_terms"


def test_a_clipped_token_is_off_policy() -> None:
    toy = head()
    old = torch.nested.nested_tensor_from_jagged(
        toy.data["old_log_probs"].values() - 0.5, toy.data["old_log_probs"].offsets()
    )
    toy.data["old_log_probs"] = old  # every ratio 1.65: those of positive advantage are clipped
    found = verdict(toy, loss_of(toy, policy), "log_prob")
    assert found.reason == "off_policy"
    assert found.num_on_policy == 0


def test_the_training_loss_stands_for_itself() -> None:
    toy = head()
    loss = loss_of(toy, policy) - 0.1 * toy.entropy.values().sum()
    found = verdict(toy, loss, "training_loss")
    assert found.reason is None
    assert found.gradient_scale == {7: 1.0, 3: 1.0}
