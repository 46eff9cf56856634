"""A run is one object, of one kind: whether an object of another kind stands for it already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.backends.generations import generations_by_run
from launcher.backends.job_facts import JobStatus
from launcher.backends.kubernetes_api import KubernetesApi
from launcher.backends.kubernetes_errors import ApiForbidden, ApiNotFound, api_path
from launcher.backends.rayjob_facts import RayJobStatus
from launcher.kubernetes_values import RUN_LABEL


@dataclass(frozen=True, slots=True)
class _Kind:
    name: str
    backend: str
    api_version: str
    resource: str
    ended: Callable[[Mapping[str, Any]], bool]


_KINDS = (
    _Kind("Job", "kubernetes", "batch/v1", "jobs", lambda item: JobStatus.of(item).ended),
    _Kind("RayJob", "kuberay", "ray.io/v1", "rayjobs", lambda item: RayJobStatus.of(item).ended),
)


def of_another_kind(api: KubernetesApi, namespace: str, run: str, kind: str) -> tuple[str, str] | None:
    """The object of a kind other than ``kind`` that drives the run, and the backend to use it with.

    None where there is none that has not ended, or none that we may see: its pods tell of it then.
    """
    for other in _KINDS:
        if other.name == kind:
            continue
        path = api_path(other.api_version, other.resource, namespace=namespace)
        try:
            items = api.list(path, labelSelector=f"{RUN_LABEL}={run}").get("items") or []
        except (ApiForbidden, ApiNotFound):  # not ours to see, or a kind that the cluster does not know
            continue
        for generation in generations_by_run(items).get(run, ()):
            if not other.ended(generation.item):
                return f"{other.name} {namespace}/{generation.name}", other.backend
    return None
