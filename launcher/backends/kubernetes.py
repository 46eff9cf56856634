"""Runs as Jobs on a Kubernetes cluster: one Job a run, one pod an attempt, the API server as the only record.

The parts: ``kubernetes_api`` asks the server; ``kubernetes_reading`` turns its answers into facts by
``job_facts`` and ``pod_facts``; ``kubernetes_orders`` changes things; ``kubernetes_logs`` and
``kubernetes_history`` tell the story.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from influence.rundir import RunPaths, RunSpec
from launcher.backends import AttemptFacts, Event, Refusal
from launcher.backends.kubernetes_api import KubernetesApi
from launcher.backends.kubernetes_errors import ApiForbidden, ApiNotFound
from launcher.backends.kubernetes_logs import AttemptLogs
from launcher.backends.kubernetes_reading import NAME, JobReader, document
from launcher.errors import BackendError
from launcher.profiles import Profile
from launcher.states import BackendFacts, Phase


class KubernetesBackend:
    """The backend ``kubernetes``.

    Args:
        profile: the cluster; its namespace is where the Jobs are.
        api: used instead of the one that the profile describes.

    Raises:
        BackendError: the kubeconfig cannot be used.
    """

    name = NAME

    def __init__(self, profile: Profile, api: KubernetesApi | None = None) -> None:
        self._root = profile.root
        self._reader = JobReader(api or KubernetesApi(profile), profile.namespace)
        self._logs = AttemptLogs(self._reader)

    def refusal(self, run: RunSpec) -> Refusal | None:
        hardware, cluster = run.spec["hardware"], run.spec["cluster"]
        lacking = []
        if hardware["nodes"] > 1:
            lacking.append(f"{hardware['nodes']} nodes; a Job has one, so use --backend kuberay")
        if cluster["node_pools"]:
            lacking.append(
                "the node pools of cluster.node_pools, which only the backend runai knows; here "
                "cluster.node_selector chooses nodes"
            )
        return Refusal(lacking, str(hardware["device"])) if lacking else None

    def document(self, run: str) -> RunSpec | None:
        jobs = self._reader.objects(run)
        if jobs is not None:
            return document(jobs.newest, self._reader.namespace)
        try:
            self._reader.api.get(self._reader.path(run))
        except ApiNotFound:
            return None
        raise BackendError(
            f"the name '{run}' is taken in namespace '{self._reader.namespace}' by a Job that is no run",
            next_step="choose another --name or --suffix",
        )

    def submit(self, run: RunSpec) -> bool:
        from launcher.backends.kubernetes_orders import Orders

        return Orders(self._reader).submit(run)

    def get(self, run: str) -> BackendFacts:
        try:
            return self._reader.facts(run)
        except ApiForbidden:
            raise  # no poll cures it
        except BackendError as error:
            reason = f"{error.what}: {error.why}" if error.why else error.what
            return BackendFacts(backend=self.name, phase=Phase.UNREACHABLE, reason=reason)

    def list(self) -> Mapping[str, BackendFacts]:
        return self._reader.all_facts()

    def attempts(self, run: str) -> Sequence[int]:
        return self._logs.attempts(run, self._paths(run))

    def read_log(self, run: str, attempt: int, offset_bytes: int) -> bytes:
        return self._logs.read(run, attempt, offset_bytes, self._paths(run))

    def history(self, run: str) -> Sequence[AttemptFacts]:
        from launcher.backends.kubernetes_history import history

        return history(self._reader, run, self._paths(run))

    def events(self, run: str) -> Sequence[Event]:
        from launcher.backends.kubernetes_history import events

        return events(self._reader, run)

    def cancel(self, run: str, *, timeout_s: float | None = None) -> BackendFacts:
        from launcher.backends.kubernetes_orders import Orders

        return Orders(self._reader).cancel(run, timeout_s)

    def suspend(self, run: str, *, timeout_s: float | None = None) -> BackendFacts:
        from launcher.backends.kubernetes_orders import Orders

        return Orders(self._reader).suspend(run, timeout_s)

    def resume(self, run: str) -> BackendFacts:
        from launcher.backends.kubernetes_orders import Orders

        return Orders(self._reader).resume(run)

    def _paths(self, run: str) -> RunPaths | None:
        return None if self._root is None else RunPaths.of(self._root, run)
