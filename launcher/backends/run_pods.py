"""Pods of runs that have not ended, whatever made them.

An object that somebody deleted leaves its pods behind, for their grace period or for good, and a run's
directory takes one pod at a time: so these count even where no object of the run is left.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from influence.rundir import RunSpec
from launcher.backends.job_facts import LOST_NODE_STEP
from launcher.backends.kubernetes_api import KubernetesApi, Object
from launcher.backends.kubernetes_errors import api_path
from launcher.backends.pod_facts import PodFacts, pod_facts
from launcher.backends.pod_obstacles import Finding
from launcher.backends.run_document import document_of_pod
from launcher.errors import BackendError
from launcher.kubernetes_values import RUN_LABEL
from launcher.states import BackendFacts, Phase

CLUSTER_LABEL = "ray.io/cluster"
"""Of the pods of a Ray cluster."""
_LIVING = "status.phase!=Succeeded,status.phase!=Failed"


@dataclass(frozen=True, slots=True)
class LivingPod:
    """A pod that has not ended."""

    facts: PodFacts
    maker: str | None
    """What made it, in words: ``Job infl-smoke-0221``; it may be gone. None where nothing claims the pod."""
    document: RunSpec | None

    @property
    def words(self) -> str:
        made = f", made by {self.maker}," if self.maker else ""
        return f"{self.facts.where}{made} {'is still stopping' if self.facts.delete_by else 'goes on'}"


def list_pods(
    api: KubernetesApi, namespace: str, run: str | None = None, *, living: bool = False
) -> list[Object]:
    """The pods of one run or of all, as the API has them. One question.

    Args:
        living: leave out those that have ended.
    """
    selectors = {"labelSelector": RUN_LABEL if run is None else f"{RUN_LABEL}={run}"}
    if living:
        selectors["fieldSelector"] = _LIVING
    found: list[Object] = (
        api.list(api_path("v1", "pods", namespace=namespace), **selectors).get("items") or []
    )
    return found


def living_pods(items: Iterable[Mapping[str, Any]]) -> list[LivingPod]:
    """Those that have not ended, the oldest first."""
    found = [_living_pod(item) for item in items if not pod_facts(item).ended]
    return sorted(found, key=lambda pod: pod.facts.order)


@dataclass(frozen=True, slots=True, kw_only=True)
class PodsLeft:
    """A namespace's runs that no object of a backend's kind stands for, by their pods that have not ended."""

    api: KubernetesApi
    namespace: str
    backend: str
    kind: str
    """Of object: ``Job``."""
    of_ray: bool
    """Whether the backend's pods are those of Ray clusters."""

    def facts(self, run: str) -> BackendFacts:
        """Of a run without an object; ABSENT where it has no pod either. One question.

        Raises:
            BackendError: the server does not answer, or the right to list pods is missing.
        """
        living = living_pods(list_pods(self.api, self.namespace, run, living=True))
        return self._facts(living, self.api.now_s())

    def all_facts(
        self, items: Iterable[Mapping[str, Any]], *, known: Container[str], now_s: float
    ) -> Iterator[tuple[str, BackendFacts]]:
        """Of the runs that are not ``known``, each with its name; asks nothing.

        Args:
            items: pods as the API has them, of whatever run.
            now_s: Unix time in seconds.
        """
        by_run: dict[str, list[Mapping[str, Any]]] = {}
        for item in items:
            labels = (item.get("metadata") or {}).get("labels") or {}
            run = labels.get(RUN_LABEL)
            if isinstance(run, str) and run not in known and (CLUSTER_LABEL in labels) is self.of_ray:
                by_run.setdefault(run, []).append(item)
        for run, own in by_run.items():
            if living := living_pods(own):
                yield run, self._facts(living, now_s)

    def _facts(self, pods: Sequence[LivingPod], now_s: float) -> BackendFacts:
        finding = _finding(self.kind, self.namespace, pods, now_s)
        return BackendFacts(
            backend=self.backend,
            phase=finding.phase,
            reason=finding.reason,
            next_step=finding.next_step,
            started_at=pods[0].facts.created_at if pods else None,
            num_attempts=len(pods) or None,
            document=next((pod.document for pod in pods if pod.document is not None), None),
        )


def _finding(kind: str, namespace: str, pods: Sequence[LivingPod], now_s: float) -> Finding:
    missing = f"no {kind} of it is in {namespace}"
    if not pods:
        return Finding(Phase.ABSENT, missing)
    for pod in pods:
        if pod.facts.deletion_overdue(now_s):
            why = f"{pod.facts.where} should have been gone since {pod.facts.delete_by}"
            return Finding(
                Phase.STUCK, f"{missing}, but {why}, and its node does not say it is", LOST_NODE_STEP
            )
    staying = [pod for pod in pods if pod.facts.delete_by is None]
    if not staying:
        return Finding(Phase.STOPPING, f"{missing}, but {pods[-1].words}")
    last = staying[-1]
    return Finding(
        Phase.EXECUTING,
        f"{missing}, but {last.words}",
        f"use the backend of {last.maker}, or let the pod end; nothing starts it again"
        if last.maker
        else f"let it end, or have it deleted: kubectl delete pod -n {namespace} {last.facts.name}; "
        "nothing starts it again",
    )


def _living_pod(item: Mapping[str, Any]) -> LivingPod:
    metadata = item.get("metadata") or {}
    owners = metadata.get("ownerReferences") or []
    owner = next((each for each in owners if each.get("controller")), None)
    facts = pod_facts(item)
    try:
        run = (metadata.get("labels") or {}).get(RUN_LABEL)
        document = document_of_pod(item.get("spec") or {}, run=run, where=facts.where)
    except BackendError:
        document = None
    return LivingPod(facts, None if owner is None else f"{owner.get('kind')} {owner.get('name')}", document)
