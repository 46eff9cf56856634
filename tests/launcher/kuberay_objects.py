"""RayJobs and the pods of their Ray clusters as an API server holds them, for tests."""

from __future__ import annotations

from typing import Any

import yaml

from influence.rundir import RunSpec
from launcher.kuberay_values import TEMPLATE, rayjob_values
from launcher.render import render_template
from tests.launcher.kubernetes_objects import NAMESPACE
from tests.launcher.test_render_job import run_of

RUN = "infl-alltoken-2node-0221"
RAYJOBS = f"/apis/ray.io/v1/namespaces/{NAMESPACE}/rayjobs"
AT = "2026-02-21T11:00:00Z"


def two_node_run(*sets: str) -> RunSpec:
    return run_of("alltoken-2node", (), f"cluster.namespace={NAMESPACE}", *sets)


def rayjob(run: RunSpec | None = None, *, name: str | None = None, **status: Any) -> dict[str, Any]:
    """The RayJob of a run as it is after its creation, with a status; deployment is jobDeploymentStatus."""
    run = run or two_node_run()
    item: dict[str, Any] = yaml.safe_load(render_template(TEMPLATE, rayjob_values(run, object_name=name)))
    item["metadata"] |= {"uid": f"uid-{name or run.run}", "creationTimestamp": AT}
    item["status"] = of_operator(**status)
    return item


def of_operator(deployment: str = "", job: str = "", **status: Any) -> dict[str, Any]:
    """A status as KubeRay writes it; empty where it has not looked yet."""
    if not deployment:
        return {}
    return {"jobDeploymentStatus": deployment, "jobStatus": job, "startTime": AT, "succeeded": 0, **status}


def failed_with(code: int, *lines: str) -> str:
    """Ray's words about an entry point that failed."""
    log = "\n".join(lines)
    failed = f"Job entrypoint command failed with exit code {code}"
    return f"{failed}, last available logs (truncated to 20,000 chars):\n{log}\n"


def ray_pod(cluster: str, *, worker: bool = False, phase: str = "Running", **status: Any) -> dict[str, Any]:
    node_type = "worker" if worker else "head"
    name = f"{cluster}-nodes-worker-abcde" if worker else f"{cluster}-head-fghij"
    metadata: dict[str, Any] = {
        "name": name, "uid": f"uid-{name}", "creationTimestamp": status.pop("at", AT),
        "labels": {"infl/run": RUN, "ray.io/cluster": cluster, "ray.io/node-type": node_type},
    }  # fmt: skip
    if (deleted := status.pop("deleted", None)) is not None:
        metadata["deletionTimestamp"] = deleted
    if phase == "Running":
        status["containerStatuses"] = [{"name": "trainer", "state": {"running": {"startedAt": AT}}}]
    node = status.pop("node", f"gpu-{int(worker)}")
    return {
        "metadata": metadata,
        "spec": {"nodeName": node, "containers": [{"name": "trainer", "image": "registry.lab/infl:2"}]},
        "status": {"phase": phase, **status},
    }
