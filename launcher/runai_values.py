"""What ``templates/runai/training.json.j2`` prints, derived from a run's spec.

What a Job can say and a training of Run:ai cannot: which exit codes are not worth a retry or not charged
(every failure counts against ``backoffLimit``), a deadline, the size of /dev/shm, a group for the volumes'
files (``fsGroup``: the claim must be writable for the user 1000), a service account, and that a secret's key
may be absent (the pod does not start without it).

Not seen on a live control plane: how large an environment variable may be, and whether a preemption counts
against ``backoffLimit``.
"""

from __future__ import annotations

import shlex
from typing import Any

from influence.rundir.spec import RunSpec
from launcher.backends.run_document import run_json
from launcher.errors import SpecError
from launcher.kubernetes_values import (
    ARTIFACTS_DIR,
    DATA_DIR,
    PRODUCT_LABEL,
    RUN_LABEL,
    SPEC_ANNOTATION,
    SPEC_LABEL,
    WANDB_ANNOTATION,
    spec_label,
)

TEMPLATE = "runai/training.json.j2"
LOOKED_UP = "<looked up at submit>"
"""Stands for the ids of the project and the cluster where the control plane was not asked."""
#: Before 2.22 the last four were the only ones.
PRIORITY_CLASSES = (
    "very-low", "low", "medium-low", "medium", "medium-high", "high", "very-high",
    "train", "build", "interactive-preemptible", "inference",
)  # fmt: skip
_MAX_ARGS = 10_000  # characters that the control plane takes


def training_values(
    run: RunSpec,
    *,
    name: str | None = None,
    project_id: str = LOOKED_UP,
    cluster_id: str = LOOKED_UP,
) -> dict[str, Any]:
    """The template's variables.

    Args:
        name: the training's name where it is not the run's: a later generation.
        project_id, cluster_id: Run:ai's ids.

    Raises:
        SpecError: the run does not fit into a training of Run:ai.
    """
    spec = run.spec
    cluster, hardware = spec["cluster"], spec["hardware"]
    if hardware["nodes"] > 1:
        raise SpecError(
            f"hardware.nodes is {hardware['nodes']}", why=SEVERAL_NODES_WHY, next_step=SEVERAL_NODES_STEP
        )
    if cluster["priority_class"] not in (None, *PRIORITY_CLASSES):
        raise SpecError(
            f"cluster.priority_class: Run:ai has no class '{cluster['priority_class']}'",
            next_step=f"use one of {', '.join(PRIORITY_CLASSES)}, or null for the project's default",
        )
    args = shlex.join(["-m", "influence.train", "--run-dir", f"{ARTIFACTS_DIR}/{run.run}"])
    if len(args) >= _MAX_ARGS:
        raise SpecError(f"the trainer's arguments take {len(args)} characters, and Run:ai takes {_MAX_ARGS}")
    annotations = {SPEC_ANNOTATION: run.spec_hash}
    if run.wandb["url"]:
        annotations[WANDB_ANNOTATION] = run.wandb["url"]
    num_gpus = hardware["ranks_per_node"] if hardware["device"] == "cuda" else 0
    return {
        "name": name or run.run,
        "project_id": project_id,
        "cluster_id": cluster_id,
        "run": run.run,
        "spec": spec,
        "run_json": run_json(run),
        "args": args,
        "labels": _named({RUN_LABEL: run.run, SPEC_LABEL: spec_label(run.spec_hash)}),
        "annotations": _named(annotations),
        "secret_keys": _secret_keys(spec),
        "image_pull_secrets": [{"name": secret} for secret in cluster["image_pull_secrets"]],
        "preemptibility": "preemptible" if cluster["preemptible"] else "non-preemptible",
        "node_affinity": _node_affinity(spec, num_gpus),
        "tolerations": [_toleration(each) for each in cluster["tolerations"]] if num_gpus else [],
        "compute": _compute(spec, num_gpus),
        "storage": _storage(cluster),
    }


SEVERAL_NODES_WHY = "a training of Run:ai is one pod"
SEVERAL_NODES_STEP = (
    "submit with --backend kuberay and a profile whose cluster.namespace is the project's, runai-<project>"
)


def _named(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _secret_keys(spec: dict[str, Any]) -> list[str]:
    """What comes from the Secret: only what must be there, since every key that is named has to be."""
    keys = ["WANDB_API_KEY"] if spec["wandb"]["mode"] == "online" else []
    cluster = spec["cluster"]
    if cluster["storage"] == "object_store" and cluster["object_store"].startswith("s3://"):
        keys += ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
    return keys


def _compute(spec: dict[str, Any], num_gpus: int) -> dict[str, Any]:
    """CPUs are a number, memory is a quantity as Kubernetes writes it (``1500Gi``)."""
    hardware = spec["hardware"]
    compute: dict[str, Any] = {
        "gpuDevicesRequest": num_gpus,
        "cpuCoreRequest": hardware["cpus"],
        "cpuCoreLimit": hardware["cpus"],
        "cpuMemoryRequest": hardware["memory"],
        "cpuMemoryLimit": hardware["memory"],
        "largeShmRequest": True,
    }
    if devices := spec["cluster"]["extended_resources"]:
        compute["extendedResources"] = [
            {"resource": resource, "quantity": str(quantity)} for resource, quantity in devices.items()
        ]
    return compute


def _node_affinity(spec: dict[str, Any], num_gpus: int) -> list[dict[str, Any]]:
    labels = dict(spec["cluster"]["node_selector"])
    if num_gpus and spec["hardware"]["gpu_product"]:
        labels[PRODUCT_LABEL] = spec["hardware"]["gpu_product"]
    return [{"key": key, "operator": "In", "values": [value]} for key, value in sorted(labels.items())]


def _toleration(toleration: dict[str, Any]) -> dict[str, Any]:
    """Kubernetes' toleration in Run:ai's words."""
    if toleration.get("key") is None:
        raise SpecError(
            "cluster.tolerations: Run:ai takes a toleration of one key only",
            next_step="name the taint's key: {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}",
        )
    operator = toleration.get("operator") or "Equal"
    told = {
        "key": toleration["key"],
        "operator": operator,
        "effect": toleration.get("effect") or "Any",
    }
    if operator == "Equal":
        told["value"] = toleration.get("value") or ""
    if toleration.get("tolerationSeconds") is not None:
        told["seconds"] = toleration["tolerationSeconds"]
    return told


def _storage(cluster: dict[str, Any]) -> dict[str, Any]:
    claims = []
    scratch: list[dict[str, Any]] = [{"path": "/tmp"}]  # noqa: S108 - a volume of the pod's own
    if cluster["storage"] == "claim":
        claims.append({"existingPvc": True, "claimName": cluster["claim"], "path": ARTIFACTS_DIR})
    else:
        volume = {"path": ARTIFACTS_DIR}
        if cluster["ephemeral_storage"] is not None:
            volume["sizeLimit"] = cluster["ephemeral_storage"]
        scratch.append(volume)
    if cluster["data_claim"] is not None:
        claims.append(
            {"existingPvc": True, "claimName": cluster["data_claim"], "path": DATA_DIR, "readOnly": True}
        )
    return {"pvc": claims, "emptyDirVolume": scratch}
