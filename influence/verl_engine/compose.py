"""verl's configuration for a run: its own defaults, composed by Hydra, with our overrides applied."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from influence.owned_settings import is_owned_by_the_run


class ConfigurationError(ValueError):
    """A setting that verl does not have, or a combination that the tracer does not support."""


def compose_config(overrides: Mapping[str, Any]) -> DictConfig:
    """verl's ``ppo_trainer`` configuration with these settings (`verl_overrides`).

    Raises:
        ConfigurationError: a key that verl does not have, or a value that it cannot hold.
    """
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer")
    for key, value in overrides.items():
        is_new = key.startswith("+")
        name = key.removeprefix("+")
        try:
            OmegaConf.update(config, name, value, merge=True, force_add=is_new)
        except OmegaConfBaseException as error:
            raise ConfigurationError(_refusal(config, name, error)) from None
    return config


def require_unowned(verl_settings: Mapping[str, Any]) -> None:
    """Refuse settings of a preset's ``verl:`` that the run directory depends on.

    Raises:
        ConfigurationError: names the key.
    """
    for key in _leaf_keys(verl_settings):
        if is_owned_by_the_run(key):
            raise ConfigurationError(
                f"verl.{key} belongs to the run directory and cannot be set; leave it out"
            )


def require_supported(config: DictConfig) -> None:
    """Refuse what would give wrong scores, or none, however it came into the configuration.

    Raises:
        ConfigurationError: names the setting and what to use instead.
    """
    actor = config.actor_rollout_ref.actor
    if actor.strategy not in ("fsdp", "fsdp2"):
        raise ConfigurationError(f"actor strategy {actor.strategy!r} is not supported: use fsdp2 or fsdp")
    if actor.strategy == "fsdp" and config.trainer.device == "cpu":
        raise ConfigurationError("actor strategy fsdp needs a GPU: use fsdp2 on a CPU")
    if max(actor.ulysses_sequence_parallel_size, actor.fsdp_config.ulysses_sequence_parallel_size) > 1:
        raise ConfigurationError(
            "Ulysses sequence parallelism is not supported: set ulysses_sequence_parallel_size to 1"
        )
    if config.actor_rollout_ref.model.use_fused_kernels or config.actor_rollout_ref.model.use_liger:
        raise ConfigurationError("fused kernels and liger bypass the traced layers: set both to False")


# What `ray.init` takes only where it starts Ray itself.
_OF_A_NEW_RAY = ("num_cpus", "num_gpus", "resources", "labels", "object_store_memory", "include_dashboard")


def require_joinable(config: DictConfig) -> None:
    """Refuse settings of a Ray that is started, where the run joins one that has its resources already.

    Raises:
        ConfigurationError: names the setting.
    """
    for name in _OF_A_NEW_RAY:
        if config.ray_kwargs.ray_init.get(name) is not None:
            raise ConfigurationError(
                f"verl.ray_kwargs.ray_init.{name} cannot be set where hardware.nodes is more than 1: the run "
                "joins a Ray cluster that has its resources already; leave it out"
            )


def require_dense(hf_config: Any) -> None:
    """Refuse mixtures of experts: their fused expert weights are no linear layers that can be traced.

    Raises:
        ConfigurationError: names the field that gives the model away.
    """
    for field in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        if (getattr(hf_config, field, None) or 0) > 1:
            raise ConfigurationError(
                f"the model is a mixture of experts ({field}), which cannot be traced yet"
            )


def _leaf_keys(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in settings.items():
        name = f"{prefix}{key.removeprefix('+')}"
        keys += _leaf_keys(value, f"{name}.") if isinstance(value, Mapping) and value else [name]
    return keys


def _refusal(config: DictConfig, name: str, error: OmegaConfBaseException) -> str:
    parent, _, last = name.rpartition(".")
    siblings = OmegaConf.select(config, parent) if parent else config
    if isinstance(siblings, DictConfig) and last not in siblings:
        near = get_close_matches(last, [str(key) for key in siblings], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"verl.{name}: verl has no such setting{hint}; write +{name} to add it all the same"
    return f"verl.{name}: {str(error).splitlines()[0]}"
