"""Kueue's view of a Job: the Workload that holds it back, admits it, or takes its machines away again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.backends.kubernetes_api import KubernetesApi, Object
from launcher.backends.kubernetes_errors import ApiForbidden, ApiNotFound, api_path

API_VERSIONS = ("kueue.x-k8s.io/v1beta1", "kueue.x-k8s.io/v1beta2")
"""The oldest first: servers keep serving it for long."""
JOB_UID_LABEL = "kueue.x-k8s.io/job-uid"


class Workloads:
    """The Workloads of a namespace."""

    def __init__(self, api: KubernetesApi, namespace: str) -> None:
        self._api = api
        self._namespace = namespace

    def of_job(self, uid: str) -> Object | None:
        """The Workload of the Job with this UID; None where Kueue has made none yet, or is not there.

        Raises:
            BackendError: it cannot be asked for.
        """
        for version in API_VERSIONS:
            path = api_path(version, "workloads", namespace=self._namespace)
            try:
                items = self._api.list(path, labelSelector=f"{JOB_UID_LABEL}={uid}").get("items") or []
            except ApiNotFound:
                continue
            if items:
                return {"apiVersion": version, **items[0]}
        return None

    def waits_for(self, uid: str) -> str | None:
        """Why a Job is held back, in Kueue's words; None where it has none, or we may not read them."""
        try:
            workload = self.of_job(uid)
        except ApiForbidden:
            return None
        return None if workload is None else words(workload)

    def set_active(self, uid: str, active: bool) -> bool:
        """Let Kueue admit a Job, or take it out of its queue and stop its pods.

        Returns:
            Whether there was a Workload to change.

        Raises:
            BackendError: it could not be changed.
        """
        workload = self.of_job(uid)
        if workload is None:
            return False
        path = api_path(
            workload["apiVersion"], "workloads", namespace=self._namespace, name=workload["metadata"]["name"]
        )
        self._api.patch(path, {"spec": {"active": active}})
        return True


def is_deactivated(workload: Mapping[str, Any]) -> bool:
    """Whether Kueue leaves it out of its queue, whatever room there is."""
    return (workload.get("spec") or {}).get("active") is False


def words(workload: Mapping[str, Any]) -> str | None:
    """What a Workload says of its Job's wait: the eviction that it follows, then why no quota is reserved."""
    conditions = {c.get("type"): c for c in (workload.get("status") or {}).get("conditions") or []}
    said = ["its Workload is deactivated, until the run is resumed"] if is_deactivated(workload) else []
    evicted, reserved = conditions.get("Evicted", {}), conditions.get("QuotaReserved", {})
    if evicted.get("status") == "True":
        said.append(f"evicted ({evicted.get('reason')}): {evicted.get('message')}")
    if reserved.get("status") == "False" and reserved.get("message"):
        said.append(str(reserved["message"]))
    return "; ".join(said) or None
