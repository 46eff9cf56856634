"""A step's responses for the engine's tests, and their scores by the tracer driven by hand."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from influence import InfluenceTracer, TracerConfig

VOCABULARY = 96


@dataclass
class Response:
    prompt: list[int]
    response: list[int]
    mask: list[int]
    uid: str
    prompt_index: int
    session_id: int
    reward: float
    advantage: float
    old_log_probs: list[float]


def save_model(directory: Path) -> None:
    """A small random Qwen2 with a tokenizer, as verl loads one."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from influence.tiny.tokenizer import build_tokenizer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)


def responses(
    num_prompts: int, num_sessions: int, *, with_tool: bool, with_padding: bool
) -> list[dict[str, Any]]:
    """Responses of different lengths, sessions of a prompt scattered; rewards differ within each prompt."""
    generator = torch.Generator().manual_seed(1)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

    rows = []
    for session in range(num_sessions):
        for prompt in range(num_prompts):
            response = tokens(3, 12)
            mask = [1] * len(response)
            if with_tool and (prompt, session) == (1, 0):
                mask[1] = 0
            reward = float((prompt + session) % 2)
            rows.append(
                Response(
                    prompt=tokens(2, 9),
                    response=response,
                    mask=mask,
                    uid=f"000001-{prompt:06d}",
                    prompt_index=50 - prompt,
                    session_id=session,
                    reward=reward,
                    advantage=1.5 * reward - 0.5 - 0.1 * prompt,
                    old_log_probs=[-4.0] * len(response),
                )
            )
    # As verl's balancing leaves them: a prompt's responses on several ranks and in several mini-batches, and
    # some prompt (here that of the lowest index) on one of two ranks only.
    order = torch.randperm(len(rows), generator=generator).tolist()
    lone, others = (
        [rows[r] for r in order if (rows[r].prompt_index == 51 - num_prompts) == x] for x in (True, False)
    )
    rows = [lone.pop() if place % 2 and lone else others.pop() for place in range(len(rows))]
    if with_padding:  # verl's own filling rows take the places of two responses
        for place in (1, 4):
            padding = {
                "mask": [0],
                "response": [0],
                "old_log_probs": [0.0],
                "uid": "padabc",
                "session_id": place,
            }
            rows[place] = Response(**{**asdict(rows[place]), **padding, "reward": 0.0, "advantage": 0.0})
    return [asdict(row) for row in rows]


@dataclass
class Expected:
    scores: list[float]
    scored: bool


def save_adapter(model_path: Path, directory: Path) -> None:
    """A LoRA adapter on all linear layers, with both its matrices random."""
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(2)
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(_load(model_path, None), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(directory)


def _load(model_path: Path, adapter: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="sdpa", dtype=torch.float32)
    if adapter is None:
        return model
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter, is_trainable=True)


def _response_log_probs(model: Any, row: Response) -> torch.Tensor:
    """Of every response token, from one unpadded sequence."""
    ids = torch.tensor([row.prompt + row.response])
    log_probs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0]
    places = torch.arange(len(row.prompt), ids.shape[1])
    return log_probs[places - 1, ids[0, places]]


def with_old_log_probs(
    model_path: Path, rows: list[dict[str, Any]], adapter: str | None
) -> list[dict[str, Any]]:
    """The rows as this very policy generated them."""
    model = _load(model_path, adapter)
    with torch.no_grad():
        return [
            {**row, "old_log_probs": _response_log_probs(model, Response(**row)).tolist()} for row in rows
        ]


def scores_by_hand(
    model_path: Path,
    rows: list[Response],
    config: TracerConfig,
    *,
    adapter: str | None = None,
    factor: float = 1.0,
) -> dict[tuple[int, int], Expected]:
    """By prompt index and session: the scores, from one unpadded sequence at a time.

    Args:
        factor: on the objective.
    """
    model = _load(model_path, adapter)
    tracer = InfluenceTracer(model, config)
    real = [row for row in rows if not row.uid.startswith("pad")]
    ratios = []
    for row_id, row in enumerate(real):
        length, mask = len(row.prompt) + len(row.response), torch.tensor(row.mask, dtype=torch.bool)
        grid = torch.full((1, length), -1)
        if config.positions == "all":
            grid[0, :-1] = row_id
        else:
            grid[0, len(row.prompt) - 1 : -1][mask] = row_id
        weight = 1.0 if config.objective == "log_prob" else row.advantage
        with tracer.capture(grid):
            log_probs = _response_log_probs(model, row)
            (factor * weight * log_probs[mask].sum()).backward()
        ratios.append(float((log_probs.detach() - torch.tensor(row.old_log_probs)).exp()[mask].mean()))
    accepted = [row.reward > config.accepted_above for row in real]
    contrast = {
        "none": [1.0] * len(real),
        "accepted_minus_rejected": [1.0 if a else -1.0 for a in accepted],
        "advantage": [row.advantage for row in real],
        "mean_ratio": ratios,
    }[config.contrast]
    emitted = tracer.pop_rows([row.prompt_index for row in real], contrast)
    return {
        (row.prompt_index, row.session_id): Expected(got.scores.tolist(), got.scored)
        for row, got in zip(real, emitted, strict=True)
    }
