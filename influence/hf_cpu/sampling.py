"""Drawing a token, and the seeds that make a retried step draw the same ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSettings:
    """How a token is drawn; the defaults draw from the model's own distribution."""

    temperature: float = 1.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities add up to at least this."""
    top_k: int = -1
    """Keep this many of the likeliest tokens; -1: all."""


def response_seed(seed: int, step: int, prompt_index: int, session_id: int) -> int:
    """A seed for one response: neighbouring responses get unrelated ones, a retry gets the same."""
    text = f"{seed} {step} {prompt_index} {session_id}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1  # 63 bits


def token_log_probs(logits_V: Tensor, settings: SamplingSettings) -> Tensor:
    """Log-probabilities that tokens are drawn with, [V] float32; -inf for those that are cut off."""
    logits_V = logits_V.float()
    if settings.temperature == 0:
        greedy_V = torch.full_like(logits_V, -torch.inf)
        greedy_V[logits_V.argmax()] = 0.0
        return greedy_V
    log_probs_V = torch.log_softmax(logits_V / settings.temperature, dim=-1)
    if settings.top_k > 0 or settings.top_p < 1:
        sorted_V, order_V = log_probs_V.sort(descending=True, stable=True)
        probs_V = sorted_V.exp()
        # A token is cut when those before it already reach top_p; the first one never is.
        is_cut_V = probs_V.cumsum(0) - probs_V >= settings.top_p
        is_cut_V[0] = False
        if settings.top_k > 0:
            is_cut_V[settings.top_k :] = True
        log_probs_V = log_probs_V.index_fill(0, order_V[is_cut_V], -torch.inf)
        log_probs_V = log_probs_V.log_softmax(dim=-1)
    return log_probs_V


def draw_token(log_probs_V: Tensor, generator: torch.Generator) -> int:
    """A token id, drawn with these log-probabilities."""
    return int(torch.multinomial(log_probs_V.exp(), 1, generator=generator))
