from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from influence.hf_cpu.sampling import SamplingSettings, draw_token, response_seed, token_log_probs

logits = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12).map(torch.tensor)


@given(logits, st.floats(0.1, 5))
@settings(max_examples=50)
def test_temperature_scales_logits(logits_V: torch.Tensor, temperature: float) -> None:
    got = token_log_probs(logits_V, SamplingSettings(temperature=temperature))
    weights = [float(v) / temperature for v in logits_V.double()]
    total = sum(torch.tensor(w, dtype=torch.float64).exp() for w in weights)
    expected = torch.stack([torch.tensor(w, dtype=torch.float64) - total.log() for w in weights])
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@given(logits, st.floats(0.05, 0.95))
@example(torch.tensor([0.0, -20.0, 0.0]), 0.9)  # takes both of the likely ones
@example(torch.tensor([0.0] * 7 + [5.960464477539063e-08]), 0.5)  # eight that differ by rounding
@settings(max_examples=50)
def test_top_p_keeps_the_smallest_set_that_reaches_it(logits_V: torch.Tensor, top_p: float) -> None:
    probs = torch.softmax(logits_V.float(), 0)
    kept = token_log_probs(logits_V, SamplingSettings(top_p=top_p)).isfinite()
    assert probs[kept].sum() >= top_p - 1e-5
    # Every kept token is at least as likely as every other one, and without the least likely it is too few.
    # Probabilities that differ by rounding only may stand in either order.
    assert not (~kept).any() or probs[kept].min() >= probs[~kept].max() - 1e-6
    assert probs[kept].sum() - probs[kept].min() < top_p + 1e-5
    assert token_log_probs(logits_V, SamplingSettings(top_p=top_p)).exp().sum() == pytest.approx(1, abs=1e-5)


def test_top_k_and_greedy() -> None:
    logits_V = torch.tensor([0.0, 3.0, 2.0, 1.0])
    kept = token_log_probs(logits_V, SamplingSettings(top_k=2)).isfinite()
    assert kept.tolist() == [False, True, True, False]
    greedy = token_log_probs(logits_V, SamplingSettings(temperature=0))
    assert draw_token(greedy, torch.Generator()) == 1


def test_draws_follow_the_probabilities_and_the_seed() -> None:
    log_probs_V = torch.tensor([0.2, 0.5, 0.3]).log()

    def draws(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [draw_token(log_probs_V, generator) for _ in range(4000)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    frequencies = torch.bincount(torch.tensor(draws(1)), minlength=3) / 4000
    torch.testing.assert_close(frequencies, log_probs_V.exp(), atol=0.03, rtol=0)


def test_every_response_has_a_seed_of_its_own() -> None:
    places = list(itertools.product(range(2), range(1, 3), range(20), range(8)))
    seeds = {response_seed(*place) for place in places}
    assert len(seeds) == len(places)
    assert response_seed(0, 1, 2, 3) == response_seed(0, 1, 2, 3)
    assert all(0 <= seed < 2**63 for seed in seeds)
