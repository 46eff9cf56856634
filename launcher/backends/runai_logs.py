"""The logs of trainings, since Run:ai's REST API has none: from the run directory, else from the pods.

The pods are reached through Kubernetes where the profile names a kubeconfig or a context. That Run:ai puts a
training's labels on its pods is documented and was not seen; by the label ``infl/run`` they are found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from influence.rundir import RunPaths
from launcher.backends.kubernetes_api import KubernetesApi
from launcher.backends.kubernetes_errors import api_path
from launcher.backends.pod_facts import pod_facts
from launcher.backends.pod_logs import LoggedPod, PodLogs
from launcher.backends.run_logs import logged_attempts, read_log_file
from launcher.errors import BackendError
from launcher.kubernetes_values import RUN_LABEL
from launcher.profiles import DEFAULT_NAMESPACE, Profile


class TrainingLogs:
    """The logs of a project's runs; it remembers how far each was read.

    Every method raises BackendError where no place that has logs can be reached.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._api: KubernetesApi | None = None
        self._logs = PodLogs(self._look, self._open)

    def attempts(self, run: str) -> Sequence[int]:
        """As ``Backend.attempts``; pods are numbered in order of creation."""
        paths = self._paths(run)
        if self._has_kubernetes:
            return self._logs.attempts(run, paths)
        if paths is None:
            raise self._nowhere(run)
        return logged_attempts(paths)

    def read(self, run: str, attempt: int, offset_bytes: int) -> bytes:
        """As ``Backend.read_log``."""
        paths = self._paths(run)
        if self._has_kubernetes:
            return self._logs.read(run, attempt, offset_bytes, paths)
        if paths is None:
            raise self._nowhere(run)
        return read_log_file(paths, attempt, offset_bytes)

    @property
    def _has_kubernetes(self) -> bool:
        return self._profile.kubeconfig is not None or self._profile.context is not None

    @property
    def _namespace(self) -> str:
        runai = self._profile.runai
        if self._profile.namespace == DEFAULT_NAMESPACE and runai is not None:
            return f"runai-{runai.project}"
        return self._profile.namespace

    def _paths(self, run: str) -> RunPaths | None:
        return None if self._profile.root is None else RunPaths.of(self._profile.root, run)

    def _kubernetes(self) -> KubernetesApi:
        if self._api is None:
            self._api = KubernetesApi(self._profile)
        return self._api

    def _look(self, run: str) -> list[LoggedPod]:
        path = api_path("v1", "pods", namespace=self._namespace)
        items = self._kubernetes().list(path, labelSelector=f"{RUN_LABEL}={run}").get("items") or []
        pods = []
        for item in items:
            containers = (item.get("spec") or {}).get("containers") or [{}]
            container = str(containers[0].get("name") or "")  # Run:ai names it as it likes
            pods.append(LoggedPod(pod_facts(item, container=container), container))
        return sorted(pods, key=lambda pod: (pod.facts.created_at, pod.facts.name))

    def _open(self, pod: LoggedPod, since: str | None, follow: bool) -> Iterator[bytes]:
        return self._kubernetes().stream_log(
            self._namespace, pod.facts.name, container=pod.container, since_time=since, follow=follow
        )

    def _nowhere(self, run: str) -> BackendError:
        return BackendError(
            f"no log of run '{run}' can be read from here",
            why="Run:ai's REST API has no logs, and this machine sees neither run directories nor pods",
            next_step=f"set root in cluster '{self._profile.name}' to where the claim is mounted here (or "
            f"give --root), or kubeconfig; or read it in Run:ai: runai training logs {run}",
        )
