"""Model, data and reward of a spec as files; the demo's are made here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from influence.rundir import TrainerExit
from influence.train.refusal import FAILED, Refusal
from influence.verl_engine.overrides import Inputs


def prepare_inputs(spec: Mapping[str, Any], made_dir: Path | None = None) -> Inputs:
    """Build what the spec asks to be built, and name the rest.

    Args:
        made_dir: where to build; None: in the user's cache, which other nodes do not see.

    Raises:
        Refusal: the cache directory cannot be written, or there are fewer additions than prompts a step.
    """
    model_path = spec["model"]["path"]
    try:
        if spec["model"]["source"] == "tiny":
            from influence.tiny.model import tiny_checkpoint

            model_path = str(tiny_checkpoint(root=made_dir))
        if spec["data"]["source"] == "arithmetic":
            return _arithmetic(model_path, spec["training"]["prompts_per_step"], made_dir)
    except OSError as error:
        raise Refusal(FAILED, f"the demo's files cannot be made: {error}") from None
    reward = spec["data"]["reward_function"] or {}
    return Inputs(
        model_path=model_path,
        train_files=tuple(spec["data"]["train_files"]),
        val_files=tuple(spec["data"]["val_files"]),
        reward_path=reward.get("path"),
        reward_name=reward.get("name", "compute_score"),
    )


def _arithmetic(model_path: str, prompts_per_step: int, made_dir: Path | None) -> Inputs:
    from influence.tiny import reward
    from influence.tiny.data import ArithmeticData, arithmetic_files

    data = ArithmeticData(num_train=max(ArithmeticData().num_train, prompts_per_step))
    try:
        files = arithmetic_files(data, made_dir)
    except ValueError as error:
        raise Refusal(
            TrainerExit.CONFIG, f"training.prompts_per_step is {prompts_per_step}: {error}"
        ) from None
    return Inputs(
        model_path=model_path,
        train_files=(str(files.train),),
        val_files=(str(files.validation),),
        reward_path=str(reward.__file__),
    )
