"""A run's spec in verl's words: dotted keys of ``verl.trainer.config.ppo_trainer`` and their values.

Pure: nothing is read or written here, and neither verl nor torch is imported. `influence.verl_engine.compose`
applies the result to verl's own configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influence.rundir import RunPaths

TRAINER_MODE = "influence"
"""Under this name our trainer is registered (`influence.verl_engine.trainer`)."""

EXTERNAL_LIB = "influence.verl_engine.external"
"""verl imports it before it builds an engine or a rollout, in every process that needs one."""

AGENT_LOOPS = Path(__file__).parents[1] / "hf_cpu" / "agent_loops.yaml"

_CPU_OBJECT_STORE_BYTES = 128 * 2**20
# verl reserves three a rank; the queue's nine actors hold one each, and others need a free one to start.
_NUM_LOGICAL_CPUS_A_RANK = 3
_NUM_LOGICAL_CPUS_BESIDES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the spec's sources stand for on this machine."""

    model_path: str
    train_files: tuple[str, ...]
    val_files: tuple[str, ...]
    reward_path: str | None = None
    """File of the reward function; None: verl's own by data source."""
    reward_name: str = "compute_score"


def verl_overrides(
    spec: Mapping[str, Any],
    paths: RunPaths,
    inputs: Inputs,
    environment: Mapping[str, str],
    *,
    with_wandb: bool,
    num_cpus: int,
    ray_address: str | None = None,
) -> dict[str, Any]:
    """The settings that differ from verl's defaults; the preset's own ``verl:`` comes last and wins.

    A key with ``+`` in front does not exist in verl's configuration and is added.

    Args:
        environment: variables for every process of Ray.
        num_cpus: of this machine. Ray is told of more where its actors would wait for a CPU for ever.
        ray_address: of a Ray cluster to join, which has its resources already; None: start Ray here.
    """
    on_cpu = spec["hardware"]["device"] == "cpu"
    num_ranks = spec["hardware"]["nodes"] * spec["hardware"]["ranks_per_node"]
    overrides = {
        **_model(spec["model"], inputs),
        **_data(spec["data"], spec["training"], inputs),
        **_actor(spec["training"], spec["model"]["dtype"]),
        **_rollout(spec["rollout"], spec["training"], spec["model"]["dtype"]),
        **_trainer(spec, paths, with_wandb=with_wandb),
        "+ray_kwargs.ray_init.runtime_env.env_vars": dict(environment),
    }
    if spec["rollout"]["name"] == "hf_cpu":
        overrides |= _hf_cpu(num_ranks)
    if ray_address is None:
        overrides |= _ray_of_our_own(num_ranks, num_cpus, on_cpu=on_cpu)
    else:
        overrides["+ray_kwargs.ray_init.address"] = ray_address
    return overrides | dict(spec["verl"])


def num_logical_cpus(num_ranks: int) -> int:
    """The CPUs that Ray must have to hand out, all nodes together, lest verl's actors wait for ever."""
    return _NUM_LOGICAL_CPUS_A_RANK * num_ranks + _NUM_LOGICAL_CPUS_BESIDES


def _ray_of_our_own(num_ranks: int, num_cpus: int, *, on_cpu: bool) -> dict[str, Any]:
    overrides = {
        "+ray_kwargs.ray_init.address": "local",  # never somebody else's Ray that runs on this machine
        "+ray_kwargs.ray_init.include_dashboard": False,
        "ray_kwargs.ray_init.num_cpus": max(num_cpus, num_logical_cpus(num_ranks)),
    }
    if on_cpu:
        overrides["+ray_kwargs.ray_init.num_gpus"] = num_ranks  # verl counts GPUs, and gives each rank one
        overrides["+ray_kwargs.ray_init.object_store_memory"] = _CPU_OBJECT_STORE_BYTES
    return overrides


def _model(model: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    return {
        "actor_rollout_ref.model.path": inputs.model_path,
        "actor_rollout_ref.model.external_lib": EXTERNAL_LIB,
        "actor_rollout_ref.model.use_remove_padding": model["use_remove_padding"],
        "actor_rollout_ref.model.enable_gradient_checkpointing": model["gradient_checkpointing"],
        "+actor_rollout_ref.model.override_config.attn_implementation": model["attn_implementation"],
    }


def _data(data: Mapping[str, Any], training: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    overrides = {
        "data.train_files": list(inputs.train_files),
        "data.val_files": list(inputs.val_files),
        "data.train_batch_size": training["prompts_per_step"],
        "data.max_prompt_length": data["max_prompt_length"],
        "data.max_response_length": data["max_response_length"],
        "data.seed": training["seed"],
    }
    if inputs.reward_path is not None:
        overrides["reward.custom_reward_function.path"] = inputs.reward_path
        overrides["reward.custom_reward_function.name"] = inputs.reward_name
    return overrides


def _actor(training: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    actor, ref = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
    overrides = {
        "algorithm.adv_estimator": "grpo",
        f"{actor}.strategy": "fsdp2",
        f"{actor}.ppo_mini_batch_size": training["mini_batch_prompts"],
        f"{actor}.ppo_micro_batch_size_per_gpu": training["micro_batch_size_per_rank"],
        f"{actor}.use_dynamic_bsz": training["use_dynamic_batch"],
        f"{actor}.ppo_max_token_len_per_gpu": training["max_tokens_per_rank"],
        f"{actor}.ppo_epochs": training["ppo_epochs"],
        f"{actor}.clip_ratio": training["clip_ratio"],
        f"{actor}.clip_ratio_low": training["clip_ratio"],  # these two are what the loss reads
        f"{actor}.clip_ratio_high": training["clip_ratio"],
        f"{actor}.loss_agg_mode": training["loss_agg_mode"],
        f"{actor}.entropy_coeff": training["entropy_coeff"],
        f"{actor}.use_kl_loss": training["use_kl_loss"],
        f"{actor}.kl_loss_coef": training["kl_loss_coef"],
        f"{actor}.optim.lr": training["learning_rate"],
        f"{actor}.data_loader_seed": training["seed"],
        f"{actor}.fsdp_config.seed": training["seed"],
        f"{ref}.log_prob_micro_batch_size_per_gpu": training["micro_batch_size_per_rank"],
    }
    if dtype == "float32":  # verl's default computes in bfloat16 with float32 weights
        full_precision = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
        overrides[f"+{actor}.fsdp_config.mixed_precision"] = full_precision
        overrides[f"+{ref}.fsdp_config.mixed_precision"] = full_precision
    return overrides


def _rollout(rollout: Mapping[str, Any], training: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    prefix = "actor_rollout_ref.rollout"
    return {
        f"{prefix}.name": rollout["name"],
        f"{prefix}.n": training["responses_per_prompt"],
        f"{prefix}.tensor_model_parallel_size": rollout["tensor_parallel_size"],
        f"{prefix}.gpu_memory_utilization": rollout["gpu_memory_utilization"],
        f"{prefix}.temperature": rollout["temperature"],
        f"{prefix}.top_p": rollout["top_p"],
        f"{prefix}.dtype": dtype,
        f"{prefix}.seed": training["seed"],
        f"{prefix}.log_prob_micro_batch_size_per_gpu": training["micro_batch_size_per_rank"],
    }


def _trainer(spec: Mapping[str, Any], paths: RunPaths, *, with_wandb: bool) -> dict[str, Any]:
    training, hardware = spec["training"], spec["hardware"]
    return {
        "trainer.v1.trainer_mode": TRAINER_MODE,
        "trainer.device": hardware["device"],
        "trainer.nnodes": hardware["nodes"],
        "trainer.n_gpus_per_node": hardware["ranks_per_node"],
        "trainer.total_training_steps": training["total_steps"],
        "trainer.total_epochs": training["total_steps"],  # an epoch has a step or more: never the limit
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": training["save_freq"] or -1,
        "trainer.max_actor_ckpt_to_keep": training["keep_checkpoints"],
        "trainer.default_local_dir": str(paths.checkpoints_dir),
        "trainer.resume_mode": "auto",
        "trainer.project_name": spec["wandb"]["project"],
        "trainer.experiment_name": paths.name,
        "trainer.logger": ["console", "file", *(["wandb"] if with_wandb else [])],
    }


def _hf_cpu(num_ranks: int) -> dict[str, Any]:
    """One server for all ranks, and no more processes around it than a small model on one machine needs.

    Compiling, which verl does by default, would take longer than such a run, and a compiler.
    """
    return {
        "data.dataloader_num_workers": 0,
        "actor_rollout_ref.actor.use_torch_compile": False,
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
        "actor_rollout_ref.ref.use_torch_compile": False,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": num_ranks,
        "actor_rollout_ref.rollout.free_cache_engine": False,
        "actor_rollout_ref.rollout.load_format": "auto",
        "actor_rollout_ref.rollout.agent.num_workers": 1,
        "actor_rollout_ref.rollout.agent.agent_loop_config_path": str(AGENT_LOOPS),
        "actor_rollout_ref.rollout.agent.default_agent_loop": "seeded_single_turn_agent",
        "reward.num_workers": 1,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    }
