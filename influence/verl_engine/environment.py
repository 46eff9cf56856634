"""Environment variables of the trainer's processes. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from influence.rundir import RunPaths, RunSpec

RUN_DIR = "INFL_RUN_DIR"
"""Where the engine commits; also the mark by which a supervisor finds the processes of a run."""

ATTEMPT = "INFL_ATTEMPT"
"""The attempt's number."""


def worker_environment(run: RunSpec, paths: RunPaths, attempt: int) -> dict[str, str]:
    """What every process of Ray needs to know, on whichever node it is. No secrets: verl prints this."""
    hardware = run.spec["hardware"]
    variables = {
        RUN_DIR: str(paths.root_dir.resolve()),
        ATTEMPT: str(attempt),
        "VERL_FILE_LOGGER_PATH": str(paths.metrics(attempt)),
        **_wandb(run.wandb, paths),
    }
    if run.spec["rollout"]["name"] == "hf_cpu":
        num_threads = max(1, hardware["cpus"] // hardware["ranks_per_node"])
        variables |= {
            "OMP_NUM_THREADS": str(num_threads),
            "TOKENIZERS_PARALLELISM": "false",
            "TQ_NUM_THREADS": "1",
        }
    if hardware["device"] == "cpu":
        variables |= {"VERL_USE_EXTERNAL_MODULES": "influence.cpu.platform", "VERL_PLATFORM": "cpu"}
    return variables


def ray_environment() -> dict[str, str]:
    """How Ray itself should behave; read when it starts."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Idle workers started in advance lack verl's environment, so none of verl's actors could use them.
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # its coming default; without it each start warns
        # Importing torch and verl can take a worker longer than Ray's minute on few slow cores.
        "RAY_worker_register_timeout_seconds": "600",
    }


def bytecode_environment(environment: Mapping[str, str], cache_dir: Path) -> dict[str, str]:
    """Share compiled bytecode where the user's environment forbids to write it beside the code.

    Without it each of a dozen processes compiles torch, verl and transformers anew, which takes longer than a
    small run.
    """
    if not environment.get("PYTHONDONTWRITEBYTECODE") or environment.get("PYTHONPYCACHEPREFIX"):
        return {}
    return {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache_dir / "pycache")}


def _wandb(wandb: Mapping[str, Any], paths: RunPaths) -> dict[str, str]:
    """One W&B run for all attempts, whichever process and node verl logs from."""
    mode = wandb.get("mode", "disabled")
    variables = {
        "WANDB_MODE": mode,
        "WANDB_DIR": str(paths.root_dir),  # W&B adds `wandb/` itself
        "WANDB_RUN_ID": wandb.get("run_id") or paths.name,
        "WANDB_RESUME": "allow",
        "WANDB_SILENT": "true",
    }
    if wandb.get("entity"):
        variables["WANDB_ENTITY"] = wandb["entity"]
    if os.environ.get("WANDB_BASE_URL"):
        variables["WANDB_BASE_URL"] = os.environ["WANDB_BASE_URL"]
    return variables
