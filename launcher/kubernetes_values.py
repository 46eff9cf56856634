"""What ``templates/kubernetes/job.yaml.j2`` prints, derived from a run's spec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from influence.rundir.exits import Verdict, classify
from influence.rundir.spec import RunSpec
from launcher.backends.run_document import run_json
from launcher.errors import SpecError

TEMPLATE = "kubernetes/job.yaml.j2"
ARTIFACTS_DIR = "/artifacts"
DATA_DIR = "/data"
GPU_RESOURCE = "nvidia.com/gpu"
RUN_LABEL = "infl/run"
SPEC_LABEL = "infl/spec-sha256"
SPEC_ANNOTATION = "infl/spec-hash"
WANDB_ANNOTATION = "infl/wandb-url"
PRODUCT_LABEL = "nvidia.com/gpu.product"
KAI_PREEMPTIBILITY_LABEL = "kai.scheduler/preemptibility"
#: The setting cluster.scheduler -> the label that names the queue.
QUEUE_LABELS = {
    "kai": "kai.scheduler/queue",
    "kueue": "kueue.x-k8s.io/queue-name",
    "runai": "runai/queue",
}
#: The setting cluster.scheduler -> the pods' schedulerName, where it is not the cluster's default one.
SCHEDULER_NAMES = {"kai": "kai-scheduler", "runai": "runai-scheduler"}
#: What the Secret cluster.secret may hold for an object store that speaks S3.
STORE_KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
)
_MAX_LABEL = 63
_LABEL_DIGITS = 32  # a label's value holds at most 63 characters, a SHA-256 has 64


def job_values(run: RunSpec, *, object_name: str | None = None) -> dict[str, Any]:
    """The template's variables.

    ``fatal_exit_codes`` and ``free_exit_codes`` are those of ``influence.rundir.exits``, so that the cluster
    retries as the local backend does.

    Args:
        object_name: the Job's name, by default the run's (``launcher.backends.generations``).

    Raises:
        SpecError: the run document is larger than the environment variable that carries it may be, or the
            run takes several nodes.
    """
    nodes = run.spec["hardware"]["nodes"]
    if nodes > 1:
        raise SpecError(
            f"hardware.nodes is {nodes}, and a Job of Kubernetes is one pod",
            next_step="use --backend kuberay",
        )
    return pod_values(run, object_name) | {
        "fatal_exit_codes": _codes(Verdict.FATAL),
        "free_exit_codes": _codes(Verdict.FREE_RETRY),
    }


def pod_values(run: RunSpec, object_name: str | None) -> dict[str, Any]:
    """The variables of ``templates/kubernetes/pod.j2`` and of the metadata around it.

    ``num_gpus`` is 0 on the CPU.

    Args:
        object_name: of the object that makes the pods; None: the run's name.

    Raises:
        SpecError: the run document is larger than the environment variable that carries it may be.
    """
    hardware, cluster = run.spec["hardware"], run.spec["cluster"]
    num_gpus = hardware["ranks_per_node"] if hardware["device"] == "cuda" else 0
    labels = {RUN_LABEL: run.run, SPEC_LABEL: spec_label(run.spec_hash)}
    annotations = {SPEC_ANNOTATION: run.spec_hash}
    if run.wandb["url"]:
        annotations[WANDB_ANNOTATION] = run.wandb["url"]
    return {
        "run": run.run,
        "object_name": run.run if object_name is None else object_name,
        "spec": run.spec,
        "run_json": run_json(run),
        "run_dir": f"{ARTIFACTS_DIR}/{run.run}",
        "labels": labels | _queue_labels(cluster),
        "pod_labels": labels | _pod_queue_labels(cluster),
        "annotations": annotations,
        "suspended": cluster["scheduler"] == "kueue",  # until Kueue admits it
        "scheduler_name": SCHEDULER_NAMES.get(cluster["scheduler"]),
        "num_gpus": num_gpus,
        "node_selector": _node_selector(hardware, cluster, num_gpus),
        "resources": _resources(hardware, cluster, num_gpus),
        "store_keys": _store_keys(cluster),
    }


def _queue_labels(cluster: Mapping[str, Any]) -> dict[str, str]:
    """Of the Job: by these a scheduler's own controllers find it."""
    key = QUEUE_LABELS.get(cluster["scheduler"])
    return {key: cluster["queue"]} if key and cluster["queue"] else {}


def _pod_queue_labels(cluster: Mapping[str, Any]) -> dict[str, str]:
    if cluster["scheduler"] == "kueue":  # admits Jobs, not pods
        return {}
    labels = _queue_labels(cluster)
    if cluster["scheduler"] == "kai":
        labels[KAI_PREEMPTIBILITY_LABEL] = "preemptible" if cluster["preemptible"] else "non-preemptible"
        priority = cluster["priority_class"]
        if priority and len(priority) <= _MAX_LABEL:
            labels["priorityClassName"] = priority
    return labels


def _node_selector(hardware: Mapping[str, Any], cluster: Mapping[str, Any], num_gpus: int) -> dict[str, str]:
    product = {PRODUCT_LABEL: hardware["gpu_product"]} if num_gpus and hardware["gpu_product"] else {}
    return {**product, **cluster["node_selector"]}


def _resources(hardware: Mapping[str, Any], cluster: Mapping[str, Any], num_gpus: int) -> dict[str, str]:
    """What the container both requests and is limited to."""
    devices = {name: str(count) for name, count in cluster["extended_resources"].items()}
    gpus = {GPU_RESOURCE: str(num_gpus)} if num_gpus else {}
    return devices | {"cpu": str(hardware["cpus"]), "memory": hardware["memory"]} | gpus


def _store_keys(cluster: Mapping[str, Any]) -> list[str]:
    """The credentials of the object store that come from the Secret; those given openly come from there."""
    if cluster["storage"] != "object_store" or not cluster["object_store"].startswith("s3://"):
        return []
    return [name for name in STORE_KEYS if name not in cluster["environment"]]


def unmet_needs(run: RunSpec) -> list[str]:
    """What the settings take for granted of the image or the cluster, a line each."""
    data, cluster = run.spec["data"], run.spec["cluster"]
    files = [path for path in (*data["train_files"], *data["val_files"]) if path.startswith(f"{DATA_DIR}/")]
    if files and cluster["data_claim"] is None:
        return [f"cluster.data_claim is null, so the image itself must hold {', '.join(files)}"]
    return []


def spec_label(spec_hash: str) -> str:
    """The label by which runs of equal spec are found: the first digits of the hash."""
    return spec_hash.removeprefix("sha256:")[:_LABEL_DIGITS]


def _codes(verdict: Verdict) -> list[int]:
    return [code for code in range(1, 256) if classify(code) is verdict]
