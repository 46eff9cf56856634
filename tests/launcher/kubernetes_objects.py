"""Jobs and pods as an API server holds them, for tests."""

from __future__ import annotations

from typing import Any

import yaml

from influence.rundir import RunSpec
from launcher.kubernetes_values import TEMPLATE, job_values
from launcher.render import render_template
from tests.launcher.test_render_job import run_of

RUN = "infl-smoke-0221"
NAMESPACE = "lab"
JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
EVENTS = f"/api/v1/namespaces/{NAMESPACE}/events"


def lab_run(*sets: str) -> RunSpec:
    return run_of("smoke", (), f"cluster.namespace={NAMESPACE}", *sets)


def job(
    run: RunSpec | None = None, *, name: str | None = None, uid: str = "job-1", **status: Any
) -> dict[str, Any]:
    """The Job of a run as it is after its creation, with a status."""
    run = run or lab_run()
    item: dict[str, Any] = yaml.safe_load(render_template(TEMPLATE, job_values(run, object_name=name)))
    item["metadata"] |= {"uid": uid, "creationTimestamp": "2026-02-21T11:00:00Z"}
    item["status"] = status
    return item


def condition(kind: str, reason: str = "", message: str = "", status: str = "True") -> dict[str, str]:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def pod(name: str, phase: str = "Running", *, job_uid: str = "job-1", **status: Any) -> dict[str, Any]:
    """A pod of a Job; ``at`` sets its time of creation, ``exit_code`` how its container ended."""
    at = status.pop("at", "2026-02-21T11:00:00Z")
    code = status.pop("exit_code", None)
    if code is not None:
        ended = {"exitCode": code, "reason": "Error", "startedAt": at, "finishedAt": at}
        status["containerStatuses"] = [{"name": "trainer", "state": {"terminated": ended}}]
    elif phase == "Running":
        status["containerStatuses"] = [{"name": "trainer", "state": {"running": {"startedAt": at}}}]
    return {
        "metadata": {
            "name": name, "uid": f"uid-{name}", "creationTimestamp": at, "labels": {"infl/run": RUN},
            "ownerReferences": [{"kind": "Job", "uid": job_uid, "controller": True}],
        },
        "spec": {"nodeName": "gpu-3", "containers": [{"name": "trainer", "image": "registry.lab/infl:2"}]},
        "status": {"phase": phase, **status},
    }  # fmt: skip
