"""The sizes of the reference run, as synthetic data: its model, its responses, its captured factors.

A rank of that run scored 96 responses to 6 prompts, 733,870 tokens, of a 1.5B Qwen2. ``tiny`` is the same in
small, to try a benchmark on a CPU; its times mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """How much there is of everything."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    rows: int
    groups: int
    tokens: int
    """Captured by one rank in one step."""

    def model_config(self) -> Qwen2Config:
        return Qwen2Config(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            vocab_size=self.vocabulary,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            use_cache=False,
        )

    def row_lengths(self, seed: int = 0) -> list[int]:
        """Tokens of each response, from 2,092 to 13,586 in the reference, that add up to `tokens`."""
        generator = torch.Generator().manual_seed(seed)
        weights = 0.3 + 1.7 * torch.rand(self.rows, generator=generator, dtype=torch.float64)
        ends = (weights.cumsum(0) / weights.sum() * self.tokens).round().long().tolist()
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def groups_and_contrast(self) -> tuple[list[int], list[float]]:
        """The group of each row, and +1 or -1 by turns: a group's rows lie together."""
        in_group = self.rows // self.groups
        return [row // in_group for row in range(self.rows)], [
            1.0 - 2.0 * (row % 2) for row in range(self.rows)
        ]


REFERENCE = Shapes(
    layers=28,
    hidden=1536,
    heads=12,
    kv_heads=2,
    intermediate=8960,
    vocabulary=151936,
    rows=96,
    groups=6,
    tokens=733_870,
)
TINY = Shapes(
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    intermediate=160,
    vocabulary=256,
    rows=12,
    groups=3,
    tokens=1_501,
)


def build_model(shapes: Shapes, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Random weights, drawn on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = Qwen2ForCausalLM._from_config(shapes.model_config(), dtype=dtype)
    return model.train()


def random_tokens(shapes: Shapes, batch: int, length: int, device: torch.device) -> Tensor:
    """int64 [batch, length]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, shapes.vocabulary, (batch, length), generator=generator).to(device)
