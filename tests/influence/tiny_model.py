"""A small causal transformer with the layer names of Qwen2, and batches of prompts and responses for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 17


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int, kv_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, kv_width)
        self.v_proj = nn.Linear(width, kv_width)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = (x.shape[0], x.shape[1], -1, x.shape[2] // self.num_heads)
        q = self.q_proj(x).reshape(heads).transpose(1, 2)
        k, v = (p(x).reshape(heads).transpose(1, 2) for p in (self.k_proj, self.v_proj))
        repeat = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask[:, None], -torch.inf).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, width: int, hidden: int, kv_width: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(width)
        self.self_attn = Attention(width, 2, kv_width)
        self.post_attention_layernorm = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyTransformer(nn.Module):
    """`checkpointing`: None, "reentrant" or "non_reentrant"; `num_passes` > 1 runs the same layers again."""

    def __init__(
        self,
        *,
        width: int = 8,
        hidden: int = 12,
        kv_width: int = 4,
        num_layers: int = 2,
        checkpointing: str | None = None,
        num_passes: int = 1,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens = nn.Embedding(VOCABULARY, width)
        self.embed_positions = nn.Embedding(64, width)
        self.layers = nn.ModuleList([Layer(width, hidden, kv_width) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.checkpointing = checkpointing
        self.num_passes = num_passes
        self.to(dtype)

    def forward(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """Logits [batch, seq, vocabulary]; a position sees earlier ones of its own segment."""
        seen = segment_ids[:, :, None] == segment_ids[:, None, :]
        place = torch.arange(seen.shape[1], device=seen.device)
        mask = seen & (place[:, None] >= place)
        x = self.embed_tokens(input_ids) + self.embed_positions(position_ids)
        for _ in range(self.num_passes):
            for layer in self.layers:
                if self.checkpointing is None:
                    x = layer(x, mask)
                else:
                    x = checkpoint(layer, x, mask, use_reentrant=self.checkpointing == "reentrant")
        return self.lm_head(self.norm(x))


@dataclass(frozen=True)
class Response:
    """A prompt with its response: tokens of both, the first of the response, its group and its contrast."""

    row_id: int
    tokens: tuple[int, ...]
    prompt_length: int
    group: int
    contrast: float
    advantage: float = 1.0

    @property
    def num_scores(self) -> int:
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True)
class TokenBatch:
    """A micro-batch as the model sees it; `row_ids`, `weights`: at positions that predict a response."""

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    row_ids: Tensor
    targets: Tensor
    weights: Tensor


def make_responses(num_responses: int, num_groups: int, seed: int = 0) -> list[Response]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    prompts = [tuple(draw(0, VOCABULARY) for _ in range(draw(2, 4))) for _ in range(num_groups)]
    responses = []
    for index in range(num_responses):
        prompt = prompts[index % num_groups]
        tokens = prompt + tuple(draw(0, VOCABULARY) for _ in range(draw(3, 8)))
        # Within a group the signs alternate: accepted, rejected, accepted, ...
        sign = 1.0 if (index // num_groups) % 2 == 0 else -1.0
        advantage = sign * (0.5 + draw(0, 100) / 100)
        responses.append(Response(index, tokens, len(prompt), 10 + index % num_groups, sign, advantage))
    return responses


def padded(responses: list[Response], extra: int = 0) -> TokenBatch:
    """One response a line, junk on its right, `extra` beyond the longest."""
    length = max(len(r.tokens) for r in responses) + extra
    return _stack([_line([r], length) for r in responses])


def packed(responses: list[Response]) -> TokenBatch:
    """All responses in one line, (1, tokens)."""
    return _stack([_line(responses, sum(len(r.tokens) for r in responses))])


def token_terms(model: nn.Module, batch: TokenBatch) -> Tensor:
    """``A_r log pi(token)`` at each position, (batch, seq); 0 where no response is predicted."""
    log_probs = model(batch.input_ids, batch.position_ids, batch.segment_ids).log_softmax(-1)
    taken = log_probs.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    return taken * batch.weights.to(taken.dtype)


def objective(model: nn.Module, batch: TokenBatch) -> Tensor:
    """``sum_r A_r sum_t log pi(token)`` of the response tokens."""
    return token_terms(model, batch).sum()


def _line(responses: list[Response], length: int) -> dict[str, list[float]]:
    line: dict[str, list[float]] = {name: [] for name in TokenBatch.__dataclass_fields__}
    for segment, r in enumerate(responses):
        n = len(r.tokens)
        predicts = [r.prompt_length - 1 <= t < n - 1 for t in range(n)]
        line["input_ids"] += r.tokens
        line["position_ids"] += range(n)
        line["segment_ids"] += [segment] * n
        line["row_ids"] += [r.row_id if p else -1 for p in predicts]
        line["targets"] += [*r.tokens[1:], 0]
        line["weights"] += [r.advantage if p else 0.0 for p in predicts]
    junk = {"input_ids": 3, "position_ids": 1, "segment_ids": -1, "row_ids": -1, "targets": 0, "weights": 0.0}
    for name, value in junk.items():
        line[name] += [value] * (length - len(line[name]))
    return line


def _stack(lines: list[dict[str, list[float]]]) -> TokenBatch:
    def column(name: str) -> Tensor:
        dtype = torch.float64 if name == "weights" else torch.int64
        return torch.tensor([line[name] for line in lines], dtype=dtype)

    return TokenBatch(**{name: column(name) for name in TokenBatch.__dataclass_fields__})
