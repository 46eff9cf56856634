"""What would make verl fail late, hang, or compute something else: found before anything is started.

Standard library only. verl hangs without a word where Ray has too few CPUs or GPUs for its actors.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from influence.machine import Machine, parse_bytes
from influence.rundir import TrainerExit
from influence.train.refusal import Refusal

VERL_VERSION = "0.9.1"
_PACKAGES = ("torch", "verl", "ray", "transformers", "transfer_queue", "cachetools", "uvicorn", "fastapi")
_AT_LEAST_ONE = (
    "total_steps",
    "prompts_per_step",
    "responses_per_prompt",
    "mini_batch_prompts",
    "ppo_epochs",
    "micro_batch_size_per_rank",
)


def preflight(spec: Mapping[str, Any], machine: Machine) -> None:
    """Check packages, settings that do not go together, input files, and the machine.

    On several nodes the driver's own machine need have none of the run's GPUs; each node is checked by
    `node_preflight` once Ray has it.

    Raises:
        Refusal: names the first problem and the next step.
    """
    _check_packages(spec)
    _check_combinations(spec)
    _check_batches(spec)
    _check_files(spec)
    _check_wandb(spec["wandb"]["mode"])
    if spec["hardware"]["nodes"] == 1:
        _check_gpus(spec["hardware"], machine)
        _check_room(spec["hardware"], machine)


def node_preflight(spec: Mapping[str, Any], machine: Machine) -> None:
    """What every one of several nodes must have, as the workers there see it; Ray has counted the GPUs.

    Raises:
        Refusal: as `preflight`.
    """
    _check_packages(spec)
    _check_files(spec)
    _check_wandb(spec["wandb"]["mode"])
    _check_room(spec["hardware"], machine)


def _check_packages(spec: Mapping[str, Any]) -> None:
    wanted = [*_PACKAGES, *(["vllm"] if spec["rollout"]["name"] == "vllm" else [])]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise _config(
            f"packages of the trainer are not installed: {', '.join(missing)}; "
            "install influence-launcher[trainer]" + (" and vllm" if "vllm" in missing else "")
        )
    version = metadata.version("verl")
    if version != VERL_VERSION:
        raise _config(
            f"verl {version} is installed, and the trainer needs {VERL_VERSION}; install verl=={VERL_VERSION}"
        )


def _check_combinations(spec: Mapping[str, Any]) -> None:
    hardware, rollout = spec["hardware"], spec["rollout"]
    if hardware["device"] == "cpu" and rollout["name"] != "hf_cpu":
        raise _config(f"rollout.name {rollout['name']!r} needs a GPU; use hf_cpu")
    if rollout["name"] == "hf_cpu" and rollout["tensor_parallel_size"] != 1:
        raise _config(
            f"rollout.tensor_parallel_size is {rollout['tensor_parallel_size']}; 1 with rollout.name hf_cpu, "
            "whose one server serves all ranks"
        )
    if hardware["device"] == "cpu" and spec["model"]["attn_implementation"] == "flash_attention_2":
        raise _config("model.attn_implementation flash_attention_2 needs a GPU; use sdpa")
    if hardware["device"] == "cpu" and spec["model"]["dtype"] != "float32":
        raise _config(f"model.dtype {spec['model']['dtype']!r} is for GPUs; use float32 on a CPU")
    for name in ("nodes", "ranks_per_node"):
        if hardware[name] < 1:
            raise _config(f"hardware.{name} is {hardware[name]}; at least 1")
    # By the node: a rollout replica that spans nodes would send every token's activations between them.
    num_ranks = hardware["ranks_per_node"]
    if hardware["device"] == "cuda" and num_ranks % rollout["tensor_parallel_size"]:
        raise _config(
            f"rollout.tensor_parallel_size {rollout['tensor_parallel_size']} does not divide "
            f"{num_ranks} ranks of a node"
        )
    if spec["training"]["keep_checkpoints"] < 2:
        raise _config(
            f"training.keep_checkpoints is {spec['training']['keep_checkpoints']}; "
            "at least 2, or a crash while saving leaves none"
        )


def _check_batches(spec: Mapping[str, Any]) -> None:
    training = spec["training"]
    num_ranks = spec["hardware"]["nodes"] * spec["hardware"]["ranks_per_node"]
    for name in _AT_LEAST_ONE:
        if training[name] < 1:
            raise _config(f"training.{name} is {training[name]}; at least 1")
    if training["prompts_per_step"] % training["mini_batch_prompts"]:
        raise _config(
            f"training.mini_batch_prompts {training['mini_batch_prompts']} does not divide "
            f"training.prompts_per_step {training['prompts_per_step']}"
        )
    mini_batch = training["mini_batch_prompts"] * training["responses_per_prompt"]
    if mini_batch % num_ranks:
        raise _config(
            f"a mini-batch has {mini_batch} responses, which {num_ranks} ranks cannot share equally"
        )
    per_rank, micro_batch = mini_batch // num_ranks, training["micro_batch_size_per_rank"]
    if not training["use_dynamic_batch"] and per_rank % micro_batch:
        raise _config(
            f"training.micro_batch_size_per_rank {micro_batch} does not divide the {per_rank} responses "
            "of a rank's mini-batch"
        )
    longest = spec["data"]["max_prompt_length"] + spec["data"]["max_response_length"]
    if training["use_dynamic_batch"] and training["max_tokens_per_rank"] < longest:
        raise _config(
            f"training.max_tokens_per_rank {training['max_tokens_per_rank']} does not hold one sequence "
            f"of up to {longest} tokens"
        )


def _check_files(spec: Mapping[str, Any]) -> None:
    data = spec["data"]
    if data["source"] == "parquet":
        for key in ("train_files", "val_files"):
            if not data[key]:
                raise _data(f"data.{key} is empty; name at least one Parquet file")
            for name in data[key]:
                _require_file(f"data.{key}", name)
    if data["reward_function"]:
        _require_file("data.reward_function", data["reward_function"].get("path", ""))
    path = spec["model"]["path"]
    if (
        spec["model"]["source"] == "hub"
        and path.startswith(("/", "./", "../", "~"))
        and not Path(path).is_dir()
    ):
        raise _data(f"model.path: {path} is not a directory")


def _require_file(key: str, name: str) -> None:
    if "://" in name:
        return  # verl fetches it
    path = Path(name).expanduser()
    if not path.is_file():
        raise _data(f"{key}: {name} is not a file on this machine")
    if path.stat().st_size == 0:
        raise _data(f"{key}: {name} is empty")


def _check_wandb(mode: str) -> None:
    if mode != "online" or importlib.util.find_spec("wandb") is None or os.environ.get("WANDB_API_KEY"):
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        is_logged_in = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        is_logged_in = False
    if not is_logged_in:
        raise _config(
            f"wandb.mode is online and there is no key for {host}: set WANDB_API_KEY, log in with "
            "`wandb login`, or use wandb.mode offline"
        )


def _check_gpus(hardware: Mapping[str, Any], machine: Machine) -> None:
    if hardware["device"] == "cuda" and machine.num_gpus < hardware["ranks_per_node"]:
        raise _config(
            f"hardware asks for {hardware['ranks_per_node']} GPUs and this machine has {machine.num_gpus}; "
            "use an overlay for this machine, or a cluster"
        )


def _check_room(hardware: Mapping[str, Any], machine: Machine) -> None:
    if machine.num_cpus < hardware["cpus"]:
        raise _config(
            f"hardware.cpus is {hardware['cpus']} and this machine gives {machine.num_cpus:g}; "
            "verl would hang without a word"
        )
    _require_bytes("hardware.memory", hardware["memory"], machine.memory_bytes, machine.has_memory)
    if hardware["device"] == "cuda":  # a CPU's ranks exchange less than any /dev/shm holds
        available = machine.shared_memory_bytes
        _require_bytes("hardware.shared_memory", hardware["shared_memory"], available, available.__ge__)


def _require_bytes(key: str, wanted: str, available_bytes: int, has: Callable[[int], bool]) -> None:
    try:
        enough = has(parse_bytes(wanted))
    except ValueError as error:
        raise _config(f"{key}: {error}") from None
    if not enough:
        raise _config(f"{key} is {wanted} and this machine gives {available_bytes / 2**30:.1f}Gi")


def _config(problem: str) -> Refusal:
    return Refusal(TrainerExit.CONFIG, problem)


def _data(problem: str) -> Refusal:
    return Refusal(TrainerExit.DATA, problem)
