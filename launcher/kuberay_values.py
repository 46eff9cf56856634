"""What ``templates/kuberay/rayjob.yaml.j2`` prints, derived from a run's spec."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from influence.machine import parse_bytes
from influence.rundir.spec import RunSpec
from launcher.kubernetes_values import pod_values

TEMPLATE = "kuberay/rayjob.yaml.j2"
#: Of the image; KubeRay chooses its probes by it. The constraints file says which one that is.
RAY_VERSION = "2.60.0"
#: A cluster that came to life only in part holds its GPUs idle; after a day it is given up, and charged.
PRE_RUNNING_DEADLINE_S = 86_400
# What verl's actors take of Ray's CPUs: so many a rank, and others beside. Ray is told of more CPUs than a
# small pod has, where the actors would wait for ever.
_NUM_CPUS_A_RANK = 3
_NUM_CPUS_BESIDES = 16


def rayjob_values(run: RunSpec, *, object_name: str | None = None) -> dict[str, Any]:
    """The template's variables: those of a pod (``launcher.kubernetes_values.pod_values``) and of the RayJob.

    Args:
        object_name: the RayJob's name, by default the run's (``launcher.backends.generations``).

    Raises:
        SpecError: the run document is larger than the environment variable that carries it may be.
    """
    values = pod_values(run, object_name)
    hardware, retry = run.spec["hardware"], run.spec["retry"]
    node = _start_params(hardware)
    return values | {
        # KubeRay hands this to a shell; `exec` so that signals reach the trainer.
        "entrypoint": "exec "
        + shlex.join(["python", "-m", "influence.train", "--run-dir", values["run_dir"]]),
        "num_workers": hardware["nodes"] - 1,
        "ray_version": RAY_VERSION,
        "ray_environment": ray_environment(retry["grace_period_s"]),
        "head_params": {"dashboard-host": "0.0.0.0"} | node,  # noqa: S104 - the operator asks from outside
        "worker_params": node,
        "pre_running_deadline_s": min(PRE_RUNNING_DEADLINE_S, retry["deadline_s"]),
    }


def ray_environment(grace_period_s: int) -> dict[str, str]:
    """How the Ray of the pods should behave; the trainer sets most of it where it starts Ray itself."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_worker_register_timeout_seconds": "600",
        "RAY_JOB_STOP_WAIT_TIME_S": str(grace_period_s),
    }


def _start_params(hardware: Mapping[str, Any]) -> dict[str, str]:
    """Of ``ray start`` on one node. On the CPU, Ray's GPUs are places for ranks."""
    ranks = hardware["ranks_per_node"]
    return {
        "num-cpus": str(max(hardware["cpus"], _NUM_CPUS_A_RANK * ranks + _NUM_CPUS_BESIDES)),
        "num-gpus": str(ranks),
        "object-store-memory": str(
            parse_bytes(hardware["shared_memory"]) // 2
        ),  # NCCL and vLLM have the rest
    }
