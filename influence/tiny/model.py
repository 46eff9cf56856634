"""A small Qwen2 that adds two-digit numbers and slips in about every other response.

It is warmed up on careless solutions, so at temperature 1 it samples right and wrong ones to nearly every
prompt: a policy with something to learn, and groups with accepted and rejected responses.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from influence.tiny.arithmetic import random_additions
from influence.tiny.cache import cached_directory
from influence.tiny.tokenizer import build_tokenizer

_NUM_THREADS = 1
_IGNORED_LABEL = -100  # transformers' loss leaves these positions out


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """The checkpoint's shape and its supervised warm-up."""

    hidden_size: int = 64
    intermediate_size: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_key_value_heads: int = 2
    slip_probability: float = 0.12
    """Of each of the two columns in the solutions it learns from."""
    num_updates: int = 640
    batch_size: int = 16
    learning_rate: float = 4e-3
    seed: int = 0


def tiny_checkpoint(model: TinyModel | None = None, root: Path | None = None) -> Path:
    """Directory of the checkpoint with its tokenizer, in the layout of the hub; about 10 s the first time."""
    settings = model or TinyModel()

    def build(directory: Path) -> None:
        # Always as many threads, so that sums are taken in one order and two builds agree.
        num_threads = torch.get_num_threads()
        torch.set_num_threads(_NUM_THREADS)
        try:
            with torch.random.fork_rng(devices=[]):
                _build(settings, directory)
        finally:
            torch.set_num_threads(num_threads)

    return cached_directory("tiny", {"format": 1, **asdict(settings)}, build, root)


def _build(settings: TinyModel, directory: Path) -> None:
    tokenizer = build_tokenizer()
    torch.manual_seed(settings.seed)
    model = _new_model(settings, tokenizer)
    _warm_up(model, tokenizer, settings)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _new_model(settings: TinyModel, tokenizer: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_key_value_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "sdpa"
    return Qwen2ForCausalLM(config)


def _warm_up(model: Any, tokenizer: Any, settings: TinyModel) -> None:
    """Supervised learning of careless solutions, on the response tokens alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.num_updates
    )
    rng = random.Random(settings.seed)
    model.train()
    for _ in range(settings.num_updates):
        input_ids_BL, labels_BL = _batch(tokenizer, settings, rng)
        loss = model(input_ids=input_ids_BL, labels=labels_BL).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _batch(tokenizer: Any, settings: TinyModel, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both [B, L], padded on the right."""
    additions = random_additions(settings.batch_size, rng)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": addition.question}], add_generation_prompt=True, tokenize=False
        )
        for addition in additions
    ]
    responses = [
        addition.response(rng, settings.slip_probability) + tokenizer.eos_token for addition in additions
    ]
    prompt_ids = tokenizer(prompts)["input_ids"]
    response_ids = tokenizer(responses)["input_ids"]
    length = max(len(p) + len(r) for p, r in zip(prompt_ids, response_ids, strict=True))
    input_ids_BL = torch.full((len(prompts), length), tokenizer.pad_token_id)
    labels_BL = torch.full((len(prompts), length), _IGNORED_LABEL)
    for row, (prompt, response) in enumerate(zip(prompt_ids, response_ids, strict=True)):
        end = len(prompt) + len(response)
        input_ids_BL[row, :end] = torch.tensor(prompt + response)
        labels_BL[row, len(prompt) : end] = torch.tensor(response)
    return input_ids_BL, labels_BL
