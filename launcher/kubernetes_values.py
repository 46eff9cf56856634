"""What ``templates/kubernetes/job.yaml.j2`` prints, derived from a run's spec."""

from __future__ import annotations

from typing import Any

from influence.rundir.exits import Verdict, classify
from influence.rundir.spec import RunSpec
from launcher.backends.run_document import run_json

TEMPLATE = "kubernetes/job.yaml.j2"
ARTIFACTS_DIR = "/artifacts"
DATA_DIR = "/data"
GPU_RESOURCE = "nvidia.com/gpu"
RUN_LABEL = "infl/run"
SPEC_LABEL = "infl/spec-sha256"
SPEC_ANNOTATION = "infl/spec-hash"
WANDB_ANNOTATION = "infl/wandb-url"
_LABEL_DIGITS = 32  # a label's value holds at most 63 characters, a SHA-256 has 64


def job_values(run: RunSpec) -> dict[str, Any]:
    """The template's variables.

    ``fatal_exit_codes`` and ``free_exit_codes`` are those of ``influence.rundir.exits``, so that the cluster
    retries as the local backend does. ``num_gpus`` is 0 on the CPU.

    Raises:
        SpecError: the run document is larger than the environment variable that carries it may be.
    """
    hardware = run.spec["hardware"]
    num_gpus = hardware["ranks_per_node"] if hardware["device"] == "cuda" else 0
    resources = {"cpu": str(hardware["cpus"]), "memory": hardware["memory"]}
    if num_gpus:
        resources[GPU_RESOURCE] = str(num_gpus)
    annotations = {SPEC_ANNOTATION: run.spec_hash}
    if run.wandb["url"]:
        annotations[WANDB_ANNOTATION] = run.wandb["url"]
    return {
        "run": run.run,
        "spec": run.spec,
        "run_json": run_json(run),
        "run_dir": f"{ARTIFACTS_DIR}/{run.run}",
        "labels": {RUN_LABEL: run.run, SPEC_LABEL: spec_label(run.spec_hash)},
        "annotations": annotations,
        "num_gpus": num_gpus,
        "resources": resources,
        "fatal_exit_codes": _codes(Verdict.FATAL),
        "free_exit_codes": _codes(Verdict.FREE_RETRY),
    }


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
