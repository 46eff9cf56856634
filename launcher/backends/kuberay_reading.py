"""What the API server knows of runs that are RayJobs: few questions, and the answers as facts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from influence.rundir import RunSpec
from launcher.backends.generations import Generation, generations_by_run
from launcher.backends.kubernetes_api import KubernetesApi, Object
from launcher.backends.kubernetes_errors import ApiNotFound, api_path
from launcher.backends.kueue import Workloads
from launcher.backends.pod_facts import PodFacts, pod_facts
from launcher.backends.rayjob_facts import RayJobStatus, find, grace_s, leaves_a_question
from launcher.backends.run_document import document_of_pod
from launcher.backends.run_pods import CLUSTER_LABEL, PodsLeft, list_pods
from launcher.errors import BackendError
from launcher.kuberay_values import TEMPLATE, rayjob_values
from launcher.kubernetes_values import RUN_LABEL
from launcher.states import BackendFacts

NAME = "kuberay"
API_VERSION = "ray.io/v1"
NODE_TYPE_LABEL = "ray.io/node-type"
_RANDOM_SUFFIX = 6  # of a Ray cluster's name after its RayJob's: a dash and five characters
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RayPod:
    """A pod of a Ray cluster."""

    cluster: str
    is_head: bool
    facts: PodFacts

    @property
    def rayjob(self) -> str:
        """The name of the RayJob that its cluster was made for."""
        return self.cluster[:-_RANDOM_SUFFIX]


@dataclass(frozen=True, slots=True)
class RunRayJobs:
    """All RayJobs of one run, and their pods where those were asked for."""

    run: str
    generations: Sequence[Generation]
    """The oldest first; at least one."""
    pods: Sequence[RayPod] = ()
    """The oldest first."""

    @property
    def newest(self) -> Generation:
        return self.generations[-1]

    def all_pods(self) -> list[PodFacts]:
        """Heads and workers of every generation, the oldest first."""
        return [pod.facts for pod in self.pods]

    def attempt_pods(self) -> list[PodFacts]:
        """The heads: the trainer runs there."""
        return [pod.facts for pod in self.pods if pod.is_head]


class RayJobReader:
    """Reads a namespace."""

    kind = "RayJob"
    ending: Mapping[str, Any] = MappingProxyType({"activeDeadlineSeconds": 1, "ttlSecondsAfterFinished": 0})
    """For ``kubernetes_orders``: ended for its deadline it is not retried, and its pods go at once."""

    def __init__(self, api: KubernetesApi, namespace: str) -> None:
        self.api = api
        self.namespace = namespace
        self.workloads = Workloads(api, namespace)
        self.left = PodsLeft(api=api, namespace=namespace, backend=NAME, kind=self.kind, of_ray=True)

    def path(self, name: str | None = None) -> str:
        """Of a RayJob, or of all of them."""
        return api_path(API_VERSION, "rayjobs", namespace=self.namespace, name=name)

    def status(self, item: Mapping[str, Any]) -> RayJobStatus:
        return RayJobStatus.of(item)

    def grace_s(self, item: Mapping[str, Any]) -> float:
        """What its pods are given to stop."""
        return grace_s(item)

    def manifest(self, run: RunSpec, name: str) -> Object:
        """The RayJob to create."""
        from launcher.render import parse_manifest, render_template

        return parse_manifest(render_template(TEMPLATE, rayjob_values(run, object_name=name)), TEMPLATE)

    def document(self, generation: Generation) -> RunSpec:
        """The run that a RayJob holds; raises as ``run_document.document_of_pod``."""
        cluster = (generation.item.get("spec") or {}).get("rayClusterSpec") or {}
        template = (cluster.get("headGroupSpec") or {}).get("template") or {}
        where = f"RayJob {self.namespace}/{generation.name}"
        return document_of_pod(template.get("spec") or {}, run=generation.run, where=where)

    def objects(self, run: str) -> RunRayJobs | None:
        """The RayJobs of a run, without pods; None where there are none. One question."""
        items = self._list(f"{RUN_LABEL}={run}")
        generations = generations_by_run(items).get(run)
        return RunRayJobs(run, generations) if generations else None

    def objects_and_pods(self, run: str) -> RunRayJobs | None:
        """The RayJobs of a run with all their pods. Two questions."""
        rayjobs = self.objects(run)
        return None if rayjobs is None else RunRayJobs(run, rayjobs.generations, self.pods(run))

    def pods(self, run: str | None = None) -> list[RayPod]:
        """Pods of one run or of all, the oldest first. One question."""
        return _ray_pods(list_pods(self.api, self.namespace, run))

    def facts(self, run: str) -> BackendFacts:
        """Of one run: a question for its RayJobs, and others only where those leave some open.

        Raises:
            ApiNotFound: the cluster has no KubeRay. BackendError: the server does not answer, or a right is
                missing.
        """
        rayjobs = self.objects(run)
        if rayjobs is None:
            return self.left.facts(run)
        status, now_s = RayJobStatus.of(rayjobs.newest.item), self.api.now_s()
        if leaves_a_question(status, now_s):
            rayjobs = RunRayJobs(run, rayjobs.generations, self.pods(run))
        waits_for = None
        if status.at_rest and status.kueue_queue is not None and not status.suspended_by_us:
            waits_for = self.workloads.waits_for(status.uid)
        return self._facts(rayjobs, now_s, waits_for)

    def all_facts(self) -> dict[str, BackendFacts]:
        """Of all runs: one question for the RayJobs, and one for the pods; raises as ``facts``.

        Runs of which only pods of a Ray cluster are left are among them.
        """
        by_run = generations_by_run(self._list(RUN_LABEL))
        now_s = self.api.now_s()
        newest = {run: RayJobStatus.of(generations[-1].item) for run, generations in by_run.items()}
        by_rayjob: dict[str, list[RayPod]] = {}
        questions = any(leaves_a_question(status, now_s) for status in newest.values())
        pod_items = list_pods(self.api, self.namespace, living=not questions)
        for pod in _ray_pods(pod_items) if questions else ():
            by_rayjob.setdefault(pod.rayjob, []).append(pod)
        found = {
            run: self._facts(
                RunRayJobs(run, generations, [p for g in generations for p in by_rayjob.get(g.name, ())]),
                now_s,
            )
            for run, generations in by_run.items()
        }
        return found | dict(self.left.all_facts(pod_items, known=by_run, now_s=now_s))

    def _facts(self, rayjobs: RunRayJobs, now_s: float, waits_for: str | None = None) -> BackendFacts:
        """The newest RayJob speaks for the run."""
        status = RayJobStatus.of(rayjobs.newest.item)
        pods = [pod.facts for pod in rayjobs.pods if pod.rayjob == status.name]
        finding = find(status, pods, now_s=now_s, waits_for=waits_for)
        return BackendFacts(
            backend=NAME,
            phase=finding.phase,
            reason=finding.reason,
            next_step=finding.next_step,
            num_charged=status.num_charged,
            started_at=status.created_at,
            num_attempts=sum(_num_attempts(RayJobStatus.of(g.item)) for g in rayjobs.generations),
            document=self._document_or_none(rayjobs.newest),
        )

    def _document_or_none(self, generation: Generation) -> RunSpec | None:
        try:
            return self.document(generation)
        except BackendError:
            return None

    def _list(self, selector: str) -> list[Object]:
        return self._where_installed(
            lambda: self.api.list(self.path(), labelSelector=selector).get("items") or []
        )

    def _where_installed(self, ask: Callable[[], _T]) -> _T:
        try:
            return ask()
        except ApiNotFound as error:
            missing = ApiNotFound(
                f"{self.api.place} knows no RayJobs: KubeRay is not installed",
                next_step="ask the administrator for KubeRay (v1.6 or later), or use --backend kubernetes",
            )
            missing.status, missing.reason = error.status, error.reason
            raise missing from None


def _ray_pods(items: Iterable[Mapping[str, Any]]) -> list[RayPod]:
    """The pods of Ray clusters, the oldest first."""
    found = []
    for item in items:
        labels = item["metadata"].get("labels") or {}
        if CLUSTER_LABEL in labels:
            is_head = labels.get(NODE_TYPE_LABEL) == "head"
            found.append(RayPod(str(labels[CLUSTER_LABEL]), is_head, pod_facts(item)))
    return sorted(found, key=lambda pod: pod.facts.order)


def _num_attempts(status: RayJobStatus) -> int:
    """Ray clusters that were started; those that a suspension took away are not among them."""
    counted = status.deployment in ("Failed", "Retrying")  # among the failed
    return status.num_failed + (1 if status.cluster and not counted else 0)
