"""Jobs that tests of the bench write themselves; the launcher's are made by the launcher."""

from __future__ import annotations

from typing import Any

from tests.cluster.bench.api import Json

GPU_RESOURCE = "nvidia.com/gpu"
#: A process that goes on until it is told to end, and then exits as an untrapped SIGTERM would.
UNTIL_TERMINATED = "trap 'exit 143' TERM; echo up; while :; do sleep 0.05; done"


def job(name: str, script: str, *, num_gpus: int = 0, pod: Json | None = None, **spec: Any) -> Json:
    """A Job of one container, ``main``, that runs a shell script; ``pod`` and ``spec`` add to it."""
    container: Json = {"name": "main", "image": "bench/image:1", "command": ["bash", "-c", script]}
    if num_gpus:
        container["resources"] = {"limits": {GPU_RESOURCE: str(num_gpus)}}
    added = dict(pod or {})
    container |= added.pop("container", {})
    template: Json = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 5, "containers": [container]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {"backoffLimit": 0, **spec, "template": {"spec": template | added}},
    }
