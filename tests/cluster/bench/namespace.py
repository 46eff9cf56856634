"""A test's own namespace, and what a site's administrator prepares in one."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.cluster.bench.api import BATCH, CORE, Api, ApiError, Json, tolerated
from tests.cluster.bench.pki import write_kubeconfig
from tests.cluster.bench.waiting import until

RBAC = "/apis/rbac.authorization.k8s.io/v1"
_TOKEN_VALIDITY_S = 3600


class Namespace:
    """Bare at first: a default service account and nothing else."""

    def __init__(self, api: Api, name: str, folder: Path) -> None:
        self.api = api
        self.name = name
        self._folder = folder
        self._volumes: list[str] = []

    @property
    def core(self) -> str:
        return f"{CORE}/namespaces/{self.name}"

    @property
    def batch(self) -> str:
        return f"{BATCH}/namespaces/{self.name}"

    # What an administrator prepares

    def create_claim(self, name: str) -> Path:
        """A bound claim for many readers and writers; returns the folder that it is."""
        folder = self._folder / "volumes" / self.name / name
        folder.mkdir(parents=True)
        volume = f"{self.name}-{name}"
        shape = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
        self.api.create(
            f"{CORE}/persistentvolumes",
            {
                "metadata": {"name": volume},
                "spec": {
                    **shape,
                    "capacity": {"storage": "1Ti"},
                    "persistentVolumeReclaimPolicy": "Retain",
                    "hostPath": {"path": str(folder)},
                    "claimRef": {"namespace": self.name, "name": name},
                },
            },
        )
        self._volumes.append(volume)
        self.api.create(
            f"{self.core}/persistentvolumeclaims",
            {
                "metadata": {"name": name},
                "spec": {**shape, "volumeName": volume, "resources": {"requests": {"storage": "1Ti"}}},
            },
        )
        claim = f"{self.core}/persistentvolumeclaims/{name}"
        until(lambda: self.api.get(claim)["status"].get("phase") == "Bound", f"claim {name} bound")
        return folder

    def create_secret(self, name: str, values: Mapping[str, str]) -> None:
        data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
        self.api.create(f"{self.core}/secrets", {"metadata": {"name": name}, "data": data})

    def create_service_account(self, name: str) -> None:
        self.api.create(f"{self.core}/serviceaccounts", {"metadata": {"name": name}})

    def grant(self, account: str, rules: Sequence[Json]) -> None:
        """Gives a service account a role of these rules, named as the account."""
        roles = f"{RBAC}/namespaces/{self.name}"
        self.api.create(f"{roles}/roles", {"metadata": {"name": account}, "rules": list(rules)})
        self.api.create(
            f"{roles}/rolebindings",
            {
                "metadata": {"name": account},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account},
                "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": self.name}],
            },
        )

    def create_quota(self, name: str, hard: Mapping[str, str]) -> str:
        """A quota that is in force; returns its path."""
        quotas = f"{self.core}/resourcequotas"
        self.api.create(quotas, {"metadata": {"name": name}, "spec": {"hard": dict(hard)}})
        until(
            lambda: self.api.get(f"{quotas}/{name}").get("status", {}).get("hard"), f"quota {name} in force"
        )
        return f"{quotas}/{name}"

    def service_account_kubeconfig(self, account: str) -> Path:
        """A kubeconfig with a token of a service account, valid for an hour."""
        path = f"{self.core}/serviceaccounts/{account}/token"
        answer = self.api.create(path, {"spec": {"expirationSeconds": _TOKEN_VALIDITY_S}})
        pki = self._folder / "pki"
        return write_kubeconfig(
            pki / f"{self.name}-{account}.kubeconfig",
            self.api.url,
            pki / "ca.crt",
            {"token": answer["status"]["token"]},
            namespace=self.name,
        )

    # What a test looks at

    def job(self, name: str) -> Json:
        return self.api.get(f"{self.batch}/jobs/{name}")

    def pods(self, selector: str = "") -> list[Json]:
        """The oldest first; of those of one second, the one that changed first."""
        found = self.api.items(f"{self.core}/pods", labelSelector=selector)

        def age(pod: Json) -> tuple[str, int]:
            return pod["metadata"]["creationTimestamp"], int(pod["metadata"]["resourceVersion"])

        return sorted(found, key=age)

    def job_pods(self, job: str) -> list[Json]:
        return self.pods(f"batch.kubernetes.io/job-name={job}")

    def running_pod(self, job: str) -> Json:
        """The pod of a Job, once it runs and is not about to go."""

        def running() -> Json | None:
            pods = self.job_pods(job)
            return next((pod for pod in pods if is_running(pod)), None)

        return until(running, f"a running pod of Job {job}")

    def wait_for_condition(self, job: str, *types: str, timeout_s: float = 60.0) -> Json:
        """The first condition of these types that a Job has."""

        def condition() -> Json | None:
            found = self.job(job).get("status", {}).get("conditions", [])
            return next((c for c in found if c["type"] in types and c["status"] == "True"), None)

        return until(condition, f"Job {job} {' or '.join(types)}", timeout_s=timeout_s)

    # Faults

    def evict(self, pod: str) -> None:
        """As a drain does."""
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": self.name},
        }
        self.api.create(f"{self.core}/pods/{pod}/eviction", body)

    def process_id(self, pod: Json, container: str) -> int:
        """The first process of a container: with SIGKILL it dies as if the kernel had run out of memory."""
        file = self._folder / "pods" / pod["metadata"]["uid"] / f"{container}.pid"
        return int(until(lambda: file.exists() and file.read_text(), f"{file}"))

    def clear(self) -> None:
        """Kills whatever runs, deletes the namespace and does not wait for its end."""
        with contextlib.suppress(ApiError):
            self.api.delete(f"{self.batch}/jobs", propagationPolicy="Background")
        with contextlib.suppress(ApiError):
            self.api.delete(f"{self.core}/pods", gracePeriodSeconds="0")
        with tolerated(404):
            self.api.delete(f"{CORE}/namespaces/{self.name}")
        for volume in self._volumes:
            with tolerated(404):
                self.api.delete(f"{CORE}/persistentvolumes/{volume}")


def is_running(pod: Json) -> bool:
    return pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
