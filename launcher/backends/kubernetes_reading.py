"""What the API server knows of runs that are Jobs: few questions, and the answers as facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from influence.rundir import RunSpec
from launcher.backends.generations import Generation, generations_by_run
from launcher.backends.job_facts import JobStatus, find, leaves_a_question
from launcher.backends.kubernetes_api import KubernetesApi, Object
from launcher.backends.kubernetes_errors import ApiForbidden, api_path
from launcher.backends.kueue import Workloads
from launcher.backends.pod_facts import PodFacts, pod_facts
from launcher.backends.pod_obstacles import Finding
from launcher.backends.run_document import document_of_pod
from launcher.backends.run_pods import PodsLeft, list_pods
from launcher.errors import BackendError
from launcher.kubernetes_values import RUN_LABEL, TEMPLATE, job_values
from launcher.states import BackendFacts

NAME = "kubernetes"


@dataclass(frozen=True, slots=True)
class RunJobs:
    """All Jobs of one run, and their pods where those were asked for."""

    run: str
    generations: Sequence[Generation]
    """The oldest first; at least one."""
    pods: Mapping[str, Sequence[PodFacts]] = field(default_factory=dict)
    """By the UID of their Job, the oldest first."""

    @property
    def newest(self) -> Generation:
        return self.generations[-1]

    def all_pods(self) -> list[PodFacts]:
        """Of every generation, the oldest first."""
        return [pod for generation in self.generations for pod in self.pods.get(_uid(generation.item), ())]

    def attempt_pods(self) -> list[PodFacts]:
        """Each pod is an attempt."""
        return self.all_pods()


class JobReader:
    """Reads a namespace."""

    def __init__(self, api: KubernetesApi, namespace: str) -> None:
        self.api = api
        self.namespace = namespace
        self.workloads = Workloads(api, namespace)
        self.left = PodsLeft(api=api, namespace=namespace, backend=NAME, kind=self.kind, of_ray=False)

    kind = "Job"
    ending: Mapping[str, Any] = MappingProxyType({"activeDeadlineSeconds": 1})
    """For ``kubernetes_orders``: the change of the spec by which the controller ends a Job and its pod."""

    def status(self, item: Mapping[str, Any]) -> JobStatus:
        return JobStatus.of(item)

    def document(self, generation: Generation) -> RunSpec:
        """The run that a Job holds; raises as ``run_document.document_of_pod``."""
        return document(generation, self.namespace)

    def manifest(self, run: RunSpec, name: str) -> Object:
        """The Job to create."""
        from launcher.render import parse_manifest, render_template

        return parse_manifest(render_template(TEMPLATE, job_values(run, object_name=name)), TEMPLATE)

    def grace_s(self, item: Mapping[str, Any]) -> float:
        """What its pods are given to stop."""
        return float(item["spec"]["template"]["spec"].get("terminationGracePeriodSeconds") or 30)

    def path(self, name: str | None = None) -> str:
        """Of a Job, or of all of them."""
        return api_path("batch/v1", "jobs", namespace=self.namespace, name=name)

    def objects(self, run: str) -> RunJobs | None:
        """The Jobs of a run, without pods; None where there are none. One question."""
        items = self.api.list(self.path(), labelSelector=f"{RUN_LABEL}={run}").get("items") or []
        generations = generations_by_run(items).get(run)
        return RunJobs(run, generations) if generations else None

    def objects_and_pods(self, run: str) -> RunJobs | None:
        """The Jobs of a run with all their pods. Two questions."""
        jobs = self.objects(run)
        return None if jobs is None else RunJobs(run, jobs.generations, self.pods(run))

    def pods(self, run: str | None = None) -> dict[str, list[PodFacts]]:
        """Pods of one run or of all, by the UID of their Job, the oldest first. One question."""
        return _by_job(list_pods(self.api, self.namespace, run))

    def facts(self, run: str) -> BackendFacts:
        """Of one run: a question for its Jobs, and others only where those leave some open.

        Raises:
            BackendError: the server does not answer, or a right is missing.
        """
        jobs = self.objects(run)
        if jobs is None:
            return self.left.facts(run)
        status = JobStatus.of(jobs.newest.item)
        if leaves_a_question(status) or status.failure is not None:
            jobs = RunJobs(run, jobs.generations, self.pods(run))
        return _Digest.of(jobs.generations).facts(self._finding(status, jobs), jobs.pods)

    def all_facts(self) -> dict[str, BackendFacts]:
        """Of all runs: one question for the Jobs, one for the pods, and at most one for events.

        Pods that have ended are left out where no Job leaves a question. Runs of which only pods are left are
        among them. Events are asked for where a Job has no pod at all: a list then says why, as ``facts``
        does. Raises as that.
        """
        items = self.api.list(self.path(), labelSelector=RUN_LABEL).get("items") or []
        digests = {run: _Digest.of(generations) for run, generations in generations_by_run(items).items()}
        del items  # hundreds of Jobs and their pods need not be in memory together
        questions = any(leaves_a_question(each.status) for each in digests.values())
        pod_items = list_pods(self.api, self.namespace, living=not questions)
        pods, now_s = _by_job(pod_items) if questions else {}, self.api.now_s()
        refused = self._failed_creates() if any(each.status.lacks_a_pod for each in digests.values()) else {}
        found = {}
        for run, each in digests.items():
            own_pods = pods.get(each.status.uid, ())
            because = _refusal_since(own_pods, refused.get(each.status.uid, ()))
            found[run] = each.facts(find(each.status, own_pods, now_s=now_s, no_pod_because=because), pods)
        return found | dict(self.left.all_facts(pod_items, known=digests, now_s=now_s))

    def _finding(self, status: JobStatus, jobs: RunJobs) -> Finding:
        pods = jobs.pods.get(status.uid, ())
        waits_for = no_pod_because = None
        if not status.ended:
            if status.suspended and status.kueue_queue is not None and not status.suspended_by_us:
                waits_for = self.workloads.waits_for(status.uid)
            if status.lacks_a_pod:
                refused = self._failed_creates(status.uid)
                no_pod_because = _refusal_since(pods, refused.get(status.uid, ()))
        return find(status, pods, now_s=self.api.now_s(), waits_for=waits_for, no_pod_because=no_pod_because)

    def _failed_creates(self, uid: str | None = None) -> dict[str, list[Object]]:
        """The Job controller's events about pods that it could not create, by the Job: of one or of all."""
        about = "involvedObject.kind=Job" if uid is None else f"involvedObject.uid={uid}"
        path = api_path("v1", "events", namespace=self.namespace)
        try:
            items = self.api.list(path, fieldSelector=f"{about},reason=FailedCreate").get("items") or []
        except ApiForbidden:
            return {}
        found: dict[str, list[Object]] = {}
        for item in items:
            found.setdefault(str((item.get("involvedObject") or {}).get("uid")), []).append(item)
        return found


def _refusal_since(pods: Sequence[PodFacts], refused: Sequence[Object]) -> str | None:
    """Why no pod could be created after these; None where one could since, or nobody says so.

    Args:
        refused: the Job's events FailedCreate.
    """
    latest = max(refused, key=event_time, default=None)
    if latest is None or (pods and event_time(latest) < pods[-1].created_at):
        return None
    return str(latest.get("message") or "FailedCreate")


@dataclass(frozen=True, slots=True)
class _Digest:
    """What is needed of a run's Jobs; the newest speaks for the run."""

    status: JobStatus
    uids: Sequence[str]
    num_pods: int
    """That the Jobs speak of; those whose end was not charged are not among them."""
    document: RunSpec | None

    @classmethod
    def of(cls, generations: Sequence[Generation]) -> _Digest:
        statuses = [JobStatus.of(generation.item) for generation in generations]
        num_pods = sum(each.num_failed + each.num_succeeded + each.num_active for each in statuses)
        return cls(
            statuses[-1], [each.uid for each in statuses], num_pods, _document_or_none(generations[-1])
        )

    def facts(self, finding: Finding, pods: Mapping[str, Sequence[PodFacts]]) -> BackendFacts:
        return BackendFacts(
            backend=NAME,
            phase=finding.phase,
            reason=finding.reason,
            next_step=finding.next_step,
            num_charged=self.status.num_charged,
            started_at=self.status.created_at,
            num_attempts=max(self.num_pods, sum(len(pods.get(uid, ())) for uid in self.uids)),
            document=self.document,
        )


def document(generation: Generation, namespace: str) -> RunSpec:
    """The run that a Job holds.

    Raises:
        BackendError: it holds none, or one that cannot be used.
    """
    template = (generation.item.get("spec") or {}).get("template") or {}
    where = f"Job {namespace}/{generation.name}"
    return document_of_pod(template.get("spec") or {}, run=generation.run, where=where)


def _document_or_none(generation: Generation) -> RunSpec | None:
    try:
        return document(generation, "")
    except BackendError:
        return None


def event_time(event: Mapping[str, Any]) -> str:
    """When an event happened last, RFC 3339; empty where it does not say."""
    series = event.get("series") or {}
    times = (
        series.get("lastObservedTime"),
        event.get("lastTimestamp"),
        event.get("eventTime"),
        (event.get("metadata") or {}).get("creationTimestamp"),
    )
    return str(next(filter(None, times), ""))


def _by_job(pods: Iterable[Mapping[str, Any]]) -> dict[str, list[PodFacts]]:
    """By the UID of their Job, the oldest first."""
    found: dict[str, list[PodFacts]] = {}
    for item in pods:
        for owner in (item.get("metadata") or {}).get("ownerReferences") or []:
            if owner.get("kind") == "Job":
                found.setdefault(str(owner.get("uid")), []).append(pod_facts(item))
    for each in found.values():
        each.sort(key=lambda pod: pod.order)
    return found


def _uid(item: Mapping[str, Any]) -> str:
    return str(item["metadata"].get("uid", ""))
