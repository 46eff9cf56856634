"""What the backends whose only record is an API server have in common."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from influence.rundir import RunPaths, RunSpec
from launcher.backends.kubernetes_errors import ApiForbidden, ApiNotFound
from launcher.backends.kubernetes_logs import attempt_logs
from launcher.backends.server_reader import Reader, RunObjects
from launcher.errors import BackendError
from launcher.profiles import Profile
from launcher.states import BackendFacts, Phase

REFUSALS_PASS_S = 60.0
"""An API server that has just started knows no roles yet, nor all kinds of objects: 403, or 404."""


class ServerBackend:
    """The methods of ``launcher.backends.Backend`` that are the same for every kind of object."""

    name: str

    def __init__(self, profile: Profile, reader: Reader[RunObjects]) -> None:
        self._root = profile.root
        self._objects = reader
        self._logs = attempt_logs(reader, self._order)
        self._answered = False
        self._refused_since_s: float | None = None

    def document(self, run: str) -> RunSpec | None:
        reader = self._objects
        objects = reader.objects(run)
        if objects is not None:
            return reader.document(objects.newest)
        try:
            reader.api.get(reader.path(run))
        except ApiNotFound:
            return reader.left.facts(run).document
        raise BackendError(
            f"the name '{run}' is taken in namespace '{reader.namespace}' by a {reader.kind} that is no run",
            next_step="choose another --name or --suffix",
        )

    def submit(self, run: RunSpec) -> bool:
        from launcher.backends.kubernetes_orders import Orders

        return Orders(self._objects).submit(run)

    def get(self, run: str) -> BackendFacts:
        try:
            facts = self._objects.facts(run)
        except BackendError as error:
            if isinstance(error, (ApiForbidden, ApiNotFound)) and not self._may_pass():
                raise  # no poll cures it
            reason = f"{error.what}: {error.why}" if error.why else error.what
            return BackendFacts(backend=self.name, phase=Phase.UNREACHABLE, reason=reason)
        self._answered, self._refused_since_s = True, None
        return facts

    def _may_pass(self) -> bool:
        """Whether a refusal may pass by itself: the same question was answered before, and not long ago."""
        if not self._answered:
            return False
        now_s = time.monotonic()
        if self._refused_since_s is None:
            self._refused_since_s = now_s
        return now_s - self._refused_since_s < REFUSALS_PASS_S

    def list(self) -> Mapping[str, BackendFacts]:
        return self._objects.all_facts()

    def attempts(self, run: str) -> Sequence[int]:
        return self._logs.attempts(run, self._paths(run))

    def read_log(self, run: str, attempt: int, offset_bytes: int) -> bytes:
        return self._logs.read(run, attempt, offset_bytes, self._paths(run))

    def cancel(self, run: str, *, timeout_s: float | None = None) -> BackendFacts:
        from launcher.backends.kubernetes_orders import Orders

        return Orders(self._objects).cancel(run, timeout_s)

    def suspend(self, run: str, *, timeout_s: float | None = None) -> BackendFacts:
        from launcher.backends.kubernetes_orders import Orders

        return Orders(self._objects).suspend(run, timeout_s)

    def resume(self, run: str) -> BackendFacts:
        from launcher.backends.kubernetes_orders import Orders

        return Orders(self._objects).resume(run)

    def _order(self, run: str) -> Sequence[str]:
        """The pods of a run, the oldest first, with those that are gone where the server tells of them."""
        return ()

    def _paths(self, run: str) -> RunPaths | None:
        return None if self._root is None else RunPaths.of(self._root, run)


def unknown_pools(run: RunSpec) -> Sequence[str]:
    """The refusal of node pools, in words, where a run asks for any."""
    if not run.spec["cluster"]["node_pools"]:
        return []
    return [
        "the node pools of cluster.node_pools, which only the backend runai knows; here "
        "cluster.node_selector chooses nodes"
    ]
