"""Runs as RayJobs: one RayJob a run, a Ray cluster an attempt, for runs on several nodes.

The parts are those of ``launcher.backends.kubernetes``, with ``kuberay_reading`` and ``rayjob_facts`` in the
places of ``kubernetes_reading`` and ``job_facts``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from influence.rundir import RunSpec
from launcher.backends import AttemptFacts, Event, Refusal
from launcher.backends.kuberay_reading import NAME, RayJobReader
from launcher.backends.kubernetes_api import KubernetesApi
from launcher.backends.server_backend import ServerBackend, unknown_pools
from launcher.profiles import Profile

_RAYJOB_NAME = re.compile(r"[a-z].*")  # Services are named after it, and a digit cannot be their first letter


class KuberayBackend(ServerBackend):
    """The backend ``kuberay``.

    Args:
        profile: the cluster; its namespace is where the RayJobs are.
        api: used instead of the one that the profile describes.

    Raises:
        BackendError: the kubeconfig cannot be used.
    """

    name = NAME

    def __init__(self, profile: Profile, api: KubernetesApi | None = None) -> None:
        self._reader = RayJobReader(api or KubernetesApi(profile), profile.namespace)
        super().__init__(profile, self._reader)

    def refusal(self, run: RunSpec) -> Refusal | None:
        hardware, cluster = run.spec["hardware"], run.spec["cluster"]
        lacking = [*unknown_pools(run)]
        if hardware["nodes"] > 1 and cluster["storage"] != "claim":
            lacking.append("storage that every node sees: cluster.storage must be claim")
        if not _RAYJOB_NAME.fullmatch(run.run):
            lacking.append(f"a name that begins with a letter; the run is named '{run.run}'")
        return Refusal(lacking, str(hardware["device"])) if lacking else None

    def history(self, run: str) -> Sequence[AttemptFacts]:
        from launcher.backends.kuberay_history import history

        return history(self._reader, run, self._paths(run))

    def events(self, run: str) -> Sequence[Event]:
        from launcher.backends.kuberay_history import events

        return events(self._reader, run)
