"""Runs as Jobs on a Kubernetes cluster: one Job a run, one pod an attempt, the API server as the only record.

The parts: ``kubernetes_api`` asks the server; ``kubernetes_reading`` turns its answers into facts by
``job_facts`` and ``pod_facts``; ``kubernetes_orders`` changes things; ``kubernetes_logs`` and
``kubernetes_history`` tell the story.
"""

from __future__ import annotations

from collections.abc import Sequence

from influence.rundir import RunSpec
from launcher.backends import AttemptFacts, Event, Refusal
from launcher.backends.kubernetes_api import KubernetesApi
from launcher.backends.kubernetes_reading import NAME, JobReader
from launcher.backends.server_backend import ServerBackend, unknown_pools
from launcher.profiles import Profile


class KubernetesBackend(ServerBackend):
    """The backend ``kubernetes``.

    Args:
        profile: the cluster; its namespace is where the Jobs are.
        api: used instead of the one that the profile describes.

    Raises:
        BackendError: the kubeconfig cannot be used.
    """

    name = NAME

    def __init__(self, profile: Profile, api: KubernetesApi | None = None) -> None:
        self._reader = JobReader(api or KubernetesApi(profile), profile.namespace)
        super().__init__(profile, self._reader)

    def refusal(self, run: RunSpec) -> Refusal | None:
        hardware = run.spec["hardware"]
        lacking = [*unknown_pools(run)]
        if hardware["nodes"] > 1:
            lacking.insert(0, f"{hardware['nodes']} nodes; a Job has one, so use --backend kuberay")
        return Refusal(lacking, str(hardware["device"])) if lacking else None

    def history(self, run: str) -> Sequence[AttemptFacts]:
        from launcher.backends.kubernetes_history import history

        return history(self._reader, run, self._paths(run))

    def _order(self, run: str) -> Sequence[str]:
        from launcher.backends.kubernetes_history import history

        return [attempt.pod for attempt in history(self._reader, run, None) if attempt.pod is not None]

    def events(self, run: str) -> Sequence[Event]:
        from launcher.backends.kubernetes_history import events

        return events(self._reader, run)
