"""What a Job and its pods say about a run: pure functions of the API's JSON.

A Job's own status answers most questions; :func:`leaves_a_question` says when its pods must be asked too.
What a status does not say yet (a Job that was just created) is QUEUED, never FAILED.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from influence.rundir.exits import describe
from launcher.backends.api_fields import count, mapping, mappings, text
from launcher.backends.pod_facts import PodFacts, age_s
from launcher.backends.pod_obstacles import Finding, not_created, not_scheduled
from launcher.kubernetes_values import QUEUE_LABELS
from launcher.states import Phase

CANCELLED_ANNOTATION = "infl/cancelled-at"
SUSPENDED_ANNOTATION = "infl/suspended-at"
KUEUE_LABEL = QUEUE_LABELS["kueue"]
LOST_NODE_STEP = (
    "an administrator frees it: delete the Node object if the machine is gone, or taint it with "
    "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute once it is surely off; the run then goes on by "
    "itself. Force-deleting the pod instead could let two of them run at once"
)
EXIT_CODE = re.compile(r"exit code (\d{1,3})\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """A Job's own words, as far as they are there."""

    name: str
    uid: str
    created_at: str | None
    suspended: bool
    """``spec.suspend``: pods are stopped, or about to be."""
    suspended_by_us: bool
    cancelled: bool
    deleting: bool
    """Somebody deleted it, and it is there until its pods are gone (or a finalizer lets go)."""
    kueue_queue: str | None
    complete: bool
    failure: tuple[str, str] | None
    """Reason and message of the condition Failed."""
    failing: tuple[str, str] | None
    """The same of FailureTarget: it will have failed once its pods are gone."""
    num_active: int
    num_ready: int
    num_terminating: int
    num_failed: int
    """Pods that failed and were charged."""
    num_succeeded: int
    backoff_limit: int
    deadline_s: int | None

    @classmethod
    def of(cls, job: Mapping[str, Any]) -> JobStatus:
        metadata, spec, status = mapping(job, "metadata"), mapping(job, "spec"), mapping(job, "status")
        annotations, labels = mapping(metadata, "annotations"), mapping(metadata, "labels")
        conditions = {
            str(c.get("type")): (str(c.get("reason") or ""), str(c.get("message") or ""))
            for c in mappings(status, "conditions")
            if c.get("status") == "True"
        }
        queue = labels.get(KUEUE_LABEL)
        return cls(
            name=str(metadata.get("name", "?")),
            uid=str(metadata.get("uid", "")),
            created_at=text(metadata, "creationTimestamp"),
            suspended=spec.get("suspend") is True,
            suspended_by_us=SUSPENDED_ANNOTATION in annotations,
            cancelled=CANCELLED_ANNOTATION in annotations,
            deleting="deletionTimestamp" in metadata,
            kueue_queue=queue if isinstance(queue, str) else None,
            complete="Complete" in conditions,
            failure=conditions.get("Failed"),
            failing=conditions.get("FailureTarget"),
            num_active=count(status, "active"),
            num_ready=count(status, "ready"),
            num_terminating=count(status, "terminating"),
            num_failed=count(status, "failed"),
            num_succeeded=count(status, "succeeded"),
            backoff_limit=count(spec, "backoffLimit"),
            deadline_s=count(spec, "activeDeadlineSeconds") or None,
        )

    @property
    def num_charged(self) -> int:
        """Retries charged so far: every charged failure but one that was the end."""
        num = self.num_failed - (1 if self.failure is not None else 0)
        return max(0, min(num, self.backoff_limit))

    @property
    def at_rest(self) -> bool:
        """Whether it is suspended, and its pods are gone."""
        return self.suspended and not self.num_active and not self.num_terminating

    @property
    def lacks_a_pod(self) -> bool:
        """Whether a pod is due and none is there, not even one that stops."""
        return not (self.ended or self.suspended or self.num_active or self.num_terminating)

    @property
    def ended(self) -> bool:
        """Whether nothing will run any more, and nothing of it is left."""
        idle = not self.num_active and not self.num_terminating
        return idle and (self.complete or self.failure is not None or (self.cancelled and self.suspended))


def leaves_a_question(job: JobStatus) -> bool:
    """Whether the pods know something that a status line needs and the Job does not say."""
    if job.ended:
        return False
    if job.num_terminating or job.deleting:
        return True
    return not job.suspended and (not job.num_active or job.num_ready < job.num_active)


def find(
    job: JobStatus,
    pods: Sequence[PodFacts],
    *,
    now_s: float,
    waits_for: str | None = None,
    no_pod_because: str | None = None,
) -> Finding:
    """The phase of a Job.

    Args:
        pods: the Job's, the oldest first; empty where they were not asked for.
        now_s: Unix time in seconds.
        waits_for: Kueue's words about a Job that it holds back.
        no_pod_because: the Job controller's words about a pod that it could not create.
    """
    if job.ended:
        return _ended(job, pods)
    stuck = _lost(pods, now_s)
    if stuck is not None:
        return stuck
    if job.deleting:
        return Finding(Phase.STOPPING, "its Job is being deleted")
    if job.cancelled:
        return Finding(Phase.STOPPING, "cancelled; its pod is stopping")
    if job.complete or job.failure is not None or job.failing is not None:
        return _ending(job)
    if job.suspended:
        return _suspended(job, waits_for)
    if job.num_ready and not job.num_terminating:
        return _executing(pods)
    live = [pod for pod in pods if not pod.ended]
    if live:
        return _not_running(live[-1])
    if job.num_active and not pods:
        return Finding(Phase.QUEUED, "its pod has not reported yet")
    return _without_pod(job, pods, no_pod_because)


def _ended(job: JobStatus, pods: Sequence[PodFacts]) -> Finding:
    if job.complete:
        return Finding(Phase.COMPLETED, "its Job is complete")
    if job.cancelled:
        return Finding(Phase.CANCELLED, "cancelled")
    reason, message = job.failure or ("", "")
    return Finding(Phase.FAILED, _failure_in_words(job, reason, message, pods))


def _failure_in_words(job: JobStatus, reason: str, message: str, pods: Sequence[PodFacts]) -> str:
    last = next((pod.ended_by for pod in reversed(pods) if pod.ended_by), None)
    if reason == "BackoffLimitExceeded":
        used = retries_used(job.backoff_limit)
        return f"{used}; the last attempt: {last}" if last else used
    if reason == "DeadlineExceeded":
        limit = f", {job.deadline_s} s," if job.deadline_s else ""
        return f"the deadline of the whole run{limit} has passed (retry.deadline_s)"
    if reason == "PodFailurePolicy":
        code = EXIT_CODE.search(message)
        if code and int(code[1]) <= 255:
            return f"{describe(int(code[1]))}, which is not worth a retry"
    return (
        f"its Job failed: {reason}: {message}"
        if message
        else f"its Job failed ({reason or 'no reason given'})"
    )


def _ending(job: JobStatus) -> Finding:
    if job.complete:
        return Finding(Phase.EXECUTING, "its Job is complete, and its pod is closing")
    reason, message = job.failure or job.failing or ("", "")
    return Finding(Phase.STOPPING, f"{_failure_in_words(job, reason, message, ())}; its last pod is stopping")


def _suspended(job: JobStatus, waits_for: str | None) -> Finding:
    if job.num_active or job.num_terminating:
        return Finding(Phase.STOPPING, "suspended; its pod is stopping")
    if job.suspended_by_us:
        return Finding(Phase.SUSPENDED, "suspended")
    if job.kueue_queue is not None:
        return in_kueues_queue(job.kueue_queue, waits_for)
    return Finding(Phase.SUSPENDED, "its Job was suspended by somebody else")


def in_kueues_queue(queue: str, waits_for: str | None) -> Finding:
    """Of what Kueue holds back, with its words where it says why."""
    words = f"waits for Kueue's queue '{queue}'"
    return Finding(Phase.QUEUED, f"{words}: {waits_for}" if waits_for else words)


def retries_used(backoff_limit: int) -> str:
    """That no retry is left, in words."""
    return f"all {backoff_limit} retries are used up" if backoff_limit else "no retry is allowed"


def _executing(pods: Sequence[PodFacts]) -> Finding:
    live = next((pod for pod in reversed(pods) if not pod.ended), None)
    return Finding(Phase.EXECUTING, f"{live.where} runs" if live is not None else "its pod runs")


def _lost(pods: Sequence[PodFacts], now_s: float) -> Finding | None:
    for pod in pods:
        if pod.deletion_overdue(now_s):
            minutes = int((age_s(pod.delete_by, now_s) or 0) // 60)
            why = f"; it was {pod.disruption}" if pod.disruption else ""
            return Finding(
                Phase.STUCK,
                f"{pod.where} should have been gone {minutes} min ago, and its node does not say so{why}",
                LOST_NODE_STEP,
            )
    return None


def _not_running(pod: PodFacts) -> Finding:
    """A pod that has not ended, of a Job that has no ready one."""
    if pod.delete_by is not None:
        return Finding(
            Phase.BACKING_OFF,
            f"{pod.where} is stopping ({pod.disruption or 'it was deleted'}); another follows",
        )
    if pod.trouble is not None:
        return Finding(Phase.STUCK, pod.trouble.reason, pod.trouble.next_step)
    if pod.unschedulable is not None:
        return not_scheduled(pod.unschedulable)
    if pod.phase == "Running":
        return Finding(Phase.EXECUTING, f"{pod.where} runs")
    if pod.node is None:
        return Finding(Phase.QUEUED, "its pod waits for the scheduler")
    return Finding(
        Phase.QUEUED, f"{pod.where} is being started" + (f": {pod.waiting}" if pod.waiting else "")
    )


def _without_pod(job: JobStatus, pods: Sequence[PodFacts], no_pod_because: str | None) -> Finding:
    """No pod lives: before the first, or between two."""
    if no_pod_because is not None:
        return not_created(no_pod_because)
    last = pods[-1] if pods else None
    if last is not None and last.phase == "Succeeded":
        return Finding(Phase.EXECUTING, "its pod has ended, and the Job is about to be complete")
    if last is not None:
        return Finding(Phase.BACKING_OFF, f"the last attempt: {last.ended_by}; another follows")
    if job.num_failed:
        return Finding(Phase.BACKING_OFF, f"{job.num_failed} attempts failed; another follows")
    return Finding(Phase.QUEUED, "the Job controller has not started a pod yet")


def stopped_because(job: JobStatus, *, newest: bool) -> str:
    """Why the Job controller took a pod away, in words.

    It does so to suspend a Job or to end one, and a Job that has ended gets no other pod. The annotations
    and conditions therefore tell those apart without a look at any clock.

    Args:
        newest: whether no pod followed.
    """
    reason, message = (newest and (job.failure or job.failing)) or ("", "")
    if reason == "DeadlineExceeded" and job.cancelled:
        return "stopped: the run was cancelled"
    if reason:
        return f"stopped: {_failure_in_words(job, reason, message, ())}"
    if newest and job.suspended and not job.suspended_by_us and job.kueue_queue is not None:
        return f"stopped: Kueue's queue '{job.kueue_queue}' took the machines back"
    return "stopped: the run was suspended"


def decisions(job: JobStatus, pods: Sequence[PodFacts]) -> list[str | None]:
    """What the Job controller did after each pod had ended, and why; None while a pod goes on.

    Args:
        pods: all of the Job's that are left, the oldest first. Charges are counted over those only.
    """
    from influence.rundir.exits import Verdict

    words: list[str | None] = []
    num_charged = 0
    for position, pod in enumerate(pods):
        verdict, later = pod.verdict, position + 1 < len(pods)
        num_charged += verdict is Verdict.CHARGED_RETRY
        if verdict is None:
            words.append(None)
        elif verdict is Verdict.DONE:
            words.append("the run is complete")
        elif later and verdict is Verdict.CHARGED_RETRY:
            words.append(f"started again, charged: retry {num_charged} of {job.backoff_limit}")
        elif later:
            words.append("started again, not charged")
        else:
            words.append(last_decision(job))
    return words


def last_decision(job: JobStatus) -> str:
    """What the Job controller did after the newest pod, which left the Job without a success."""
    if job.cancelled:
        return "not started again: cancelled"
    reason, message = job.failure or job.failing or ("", "")
    if reason:
        return f"not started again: {_failure_in_words(job, reason, message, ())}"
    if job.suspended:
        return "not started again before the run is resumed"
    return "will be started again"
