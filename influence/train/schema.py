"""The part of a run's spec that the trainer reads: which keys there must be, and of which type."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from influence.config import TracerConfig, TracerConfigError
from influence.rundir import TrainerExit
from influence.train.refusal import Refusal

_NUMBER = (int, float)

_SECTIONS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "model": {
        "source": str,
        "path": str,
        "attn_implementation": str,
        "dtype": str,
        "gradient_checkpointing": bool,
        "use_remove_padding": bool,
    },
    "data": {
        "source": str,
        "train_files": list,
        "val_files": list,
        "max_prompt_length": int,
        "max_response_length": int,
        "reward_function": (dict, type(None)),
    },
    "training": {
        "total_steps": int,
        "prompts_per_step": int,
        "responses_per_prompt": int,
        "mini_batch_prompts": int,
        "ppo_epochs": int,
        "micro_batch_size_per_rank": int,
        "use_dynamic_batch": bool,
        "max_tokens_per_rank": int,
        "learning_rate": _NUMBER,
        "loss_agg_mode": str,
        "clip_ratio": _NUMBER,
        "entropy_coeff": _NUMBER,
        "use_kl_loss": bool,
        "kl_loss_coef": _NUMBER,
        "save_freq": int,
        "keep_checkpoints": int,
        "seed": int,
    },
    "rollout": {
        "name": str,
        "tensor_parallel_size": int,
        "gpu_memory_utilization": _NUMBER,
        "temperature": _NUMBER,
        "top_p": _NUMBER,
    },
    "store": {"scores_dtype": str, "columns": list},
    "hardware": {
        "device": str,
        "nodes": int,
        "ranks_per_node": int,
        "gpu_product": (str, type(None)),
        "cpus": _NUMBER,
        "memory": str,
        "shared_memory": str,
    },
    "retry": {"backoff_limit": int, "backoff_s": _NUMBER, "grace_period_s": _NUMBER, "deadline_s": _NUMBER},
    "wandb": {"mode": str, "entity": (str, type(None)), "project": str},
}

_CHOICES = {
    "model.source": ("hub", "tiny"),
    "model.dtype": ("bfloat16", "float32"),
    "data.source": ("parquet", "arithmetic"),
    "rollout.name": ("vllm", "hf_cpu"),
    "hardware.device": ("cuda", "cpu"),
    "wandb.mode": ("online", "offline", "disabled"),
}


def require_valid_spec(spec: Mapping[str, Any]) -> None:
    """Check names, types and choices of a spec, whoever wrote it.

    Raises:
        Refusal: with the configuration's exit code; names the key, and the nearest valid one.
    """
    for section, keys in _SECTIONS.items():
        values = spec.get(section)
        if not isinstance(values, Mapping):
            raise _refuse(f"the section {section!r} is missing")
        for key in values:
            if key not in keys:
                near = get_close_matches(key, list(keys), n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(keys)}"
                raise _refuse(f"{section}.{key} is no option; {hint}")
        for key, types in keys.items():
            if key not in values:
                raise _refuse(f"{section}.{key} is missing")
            if not isinstance(values[key], types) or (isinstance(values[key], bool) and types is not bool):
                raise _refuse(f"{section}.{key} is {values[key]!r}, which has the wrong type")
    for place, choices in _CHOICES.items():
        section, key = place.split(".")
        if spec[section][key] not in choices:
            raise _refuse(f"{place} is {spec[section][key]!r}; valid: {', '.join(choices)}")
    if not isinstance(spec.get("verl"), Mapping):
        raise _refuse("the section 'verl' is missing")
    try:
        TracerConfig.from_mapping(spec.get("influence", {}))
    except TracerConfigError as error:
        raise _refuse(str(error)) from None


def _refuse(problem: str) -> Refusal:
    return Refusal(TrainerExit.CONFIG, f"run.json: {problem}")
