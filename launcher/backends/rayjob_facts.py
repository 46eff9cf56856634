"""What a RayJob and its pods say about a run: pure functions of the API's JSON.

KubeRay's operator writes the status: ``jobDeploymentStatus`` is how far it came, ``jobStatus`` what Ray's job
server says of the trainer, ``message`` the server's words, with the trainer's exit code and last lines.
Every failure is charged, and each retry has a Ray cluster of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from influence.rundir.exits import Verdict, classify, describe
from launcher.backends.api_fields import count, mapping, text
from launcher.backends.job_facts import (
    CANCELLED_ANNOTATION,
    EXIT_CODE,
    KUEUE_LABEL,
    LOST_NODE_STEP,
    SUSPENDED_ANNOTATION,
    in_kueues_queue,
    retries_used,
)
from launcher.backends.pod_facts import PodFacts, age_s
from launcher.backends.pod_obstacles import Finding, not_scheduled
from launcher.secrets import redacted
from launcher.states import Phase

#: An operator that watches the namespace reacts within seconds.
UNSEEN_AFTER_S = 120.0
# How long after its end a RayJob's pods are looked for: its ttlSecondsAfterFinished, and then some.
_CLOSING_S = 300.0
_ENDED = frozenset(("Complete", "Failed", "ValidationFailed"))
_TRAINERS_WORDS = re.compile(r"^influence\.train: (.+)$", re.MULTILINE)
_MAX_WORDS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class RayJobStatus:
    """A RayJob's own words, as far as they are there."""

    name: str
    uid: str
    created_at: str | None
    suspended: bool
    """``spec.suspend``: its Ray cluster is taken down, or about to be."""
    suspended_by_us: bool
    cancelled: bool
    deleting: bool
    """Somebody deleted it, and its finalizer holds it until its Ray cluster is gone."""
    kueue_queue: str | None
    seen: bool
    """Whether the operator has written any status."""
    deployment: str
    job: str
    reason: str
    message: str
    cluster: str
    """The name of the Ray cluster of this attempt; empty between two."""
    started_at: str | None
    """Of this attempt."""
    ended_at: str | None
    num_failed: int
    backoff_limit: int
    deadline_s: int | None
    pre_running_deadline_s: int | None
    grace_s: float
    """What the pods get to stop."""

    @classmethod
    def of(cls, rayjob: Mapping[str, Any]) -> RayJobStatus:
        metadata, spec = mapping(rayjob, "metadata"), mapping(rayjob, "spec")
        status = mapping(rayjob, "status")
        annotations, labels = mapping(metadata, "annotations"), mapping(metadata, "labels")
        queue = labels.get(KUEUE_LABEL)
        return cls(
            name=str(metadata.get("name", "?")),
            uid=str(metadata.get("uid", "")),
            created_at=_text(metadata, "creationTimestamp") or None,
            suspended=spec.get("suspend") is True,
            suspended_by_us=SUSPENDED_ANNOTATION in annotations,
            cancelled=CANCELLED_ANNOTATION in annotations,
            deleting="deletionTimestamp" in metadata,
            kueue_queue=queue if isinstance(queue, str) else None,
            seen=bool(_text(status, "jobDeploymentStatus") or status.get("startTime")),
            deployment=_text(status, "jobDeploymentStatus"),
            job=_text(status, "jobStatus"),
            reason=_text(status, "reason"),
            message=_text(status, "message"),
            cluster=_text(status, "rayClusterName"),
            started_at=_text(status, "startTime") or None,
            ended_at=_text(status, "endTime") or None,
            num_failed=count(status, "failed"),
            backoff_limit=count(spec, "backoffLimit"),
            deadline_s=count(spec, "activeDeadlineSeconds") or None,
            pre_running_deadline_s=count(spec, "preRunningDeadlineSeconds") or None,
            grace_s=grace_s(rayjob),
        )

    @property
    def ended(self) -> bool:
        """Whether the operator will start nothing more; pods may still be closing."""
        idle = self.deployment in ("", "Suspended") and self.suspended
        return self.deployment in _ENDED or (self.cancelled and idle)

    @property
    def at_rest(self) -> bool:
        """Whether it is suspended, and its pods are gone."""
        return self.suspended and self.deployment in ("", "Suspended")

    @property
    def num_charged(self) -> int:
        """Retries charged so far: every failure but one that was the end."""
        num = self.num_failed - (1 if self.deployment == "Failed" else 0)
        return max(0, min(num, self.backoff_limit))

    @property
    def exit_code(self) -> int | None:
        """What the trainer of this attempt exited with; None while it runs, or where nobody says."""
        if self.job == "SUCCEEDED":
            return 0
        found = EXIT_CODE.search(self.message) if self.job == "FAILED" else None
        code = int(found[1]) if found else None
        return code if code is not None and 0 <= code <= 255 else None

    @property
    def ended_by(self) -> str | None:
        """What ended this attempt, in words; None while it goes on."""
        if self.job == "SUCCEEDED":
            return describe(0)
        if self.reason == "DeadlineExceeded" and self.cancelled:
            return "stopped: the run was cancelled"
        if self.reason == "DeadlineExceeded":
            limit = f", {self.deadline_s} s," if self.deadline_s else ""
            return f"the deadline of an attempt{limit} has passed (retry.deadline_s)"
        if self.reason == "PreRunningDeadlineExceeded":
            limit = f"{self.pre_running_deadline_s} s" if self.pre_running_deadline_s else "the time allowed"
            return f"not all of its pods ran within {limit}"
        if self.job == "STOPPED":
            return "its Ray job was stopped by somebody"
        if self.exit_code is not None:
            said = _TRAINERS_WORDS.findall(self.message)
            words = describe(self.exit_code)
            return f"{words}: {redacted(_shortened(said[-1]))}" if said else words
        if self.deployment in ("Failed", "Retrying", "ValidationFailed") or self.job == "FAILED":
            return (
                redacted(_shortened(self.message))
                or self.reason
                or "it failed, and the operator does not say why"
            )
        return None


def grace_s(rayjob: Mapping[str, Any]) -> float:
    """``terminationGracePeriodSeconds`` of the head's pod, seconds."""
    head = mapping(mapping(mapping(rayjob, "spec"), "rayClusterSpec"), "headGroupSpec")
    return float(count(mapping(mapping(head, "template"), "spec"), "terminationGracePeriodSeconds") or 30)


def leaves_a_question(job: RayJobStatus, now_s: float) -> bool:
    """Whether the pods know something that a status line needs and the RayJob does not say."""
    if job.ended:
        ended_s = age_s(job.ended_at, now_s)
        return job.cancelled and ended_s is not None and ended_s < job.grace_s + _CLOSING_S
    return job.deleting or job.deployment in ("Initializing", "Running", "Suspending", "Retrying")


def find(
    job: RayJobStatus,
    pods: Sequence[PodFacts],
    *,
    now_s: float,
    waits_for: str | None = None,
) -> Finding:
    """The phase of a RayJob.

    Args:
        pods: of its Ray clusters, the oldest first; empty where they were not asked for.
        now_s: Unix time in seconds.
        waits_for: Kueue's words about a RayJob that it holds back.
    """
    living = [pod for pod in pods if not pod.ended]
    for pod in living:
        if pod.deletion_overdue(now_s):
            return Finding(
                Phase.STUCK,
                f"{pod.where} should have been gone since {pod.delete_by}, and its node does not say it is",
                LOST_NODE_STEP,
            )
    if job.ended:
        if job.cancelled and job.job != "SUCCEEDED":
            stopping = Finding(Phase.STOPPING, "cancelled; its pods are stopping")
            return stopping if living else Finding(Phase.CANCELLED, "cancelled")
        return _ended(job)
    if job.deleting:
        return Finding(Phase.STOPPING, "its RayJob is being deleted")
    if job.cancelled:
        return Finding(Phase.STOPPING, "cancelled; KubeRay is about to end it")
    if job.deployment in ("", "Suspended"):
        return _waiting(job, now_s, waits_for)
    if job.deployment == "Suspending" or (job.suspended and job.deployment != "Retrying"):
        return Finding(Phase.STOPPING, "suspended; its pods are stopping")
    if job.deployment == "Retrying":
        last = job.ended_by or "failed"
        return Finding(Phase.BACKING_OFF, f"the last attempt: {last}; another follows")
    if job.deployment == "Running":
        return _running(job, living)
    return _starting(job, living)


def _ended(job: RayJobStatus) -> Finding:
    if job.deployment == "ValidationFailed":
        return Finding(Phase.FAILED, f"KubeRay refuses the RayJob: {_shortened(job.message)}")
    if job.job == "SUCCEEDED":
        return Finding(Phase.COMPLETED, "its RayJob is complete")
    last = job.ended_by or "its RayJob failed"
    if job.reason == "DeadlineExceeded" or job.deployment == "Complete":
        return Finding(Phase.FAILED, last)
    code = job.exit_code
    hint = "; KubeRay retries what no retry cures" if code and classify(code) is Verdict.FATAL else ""
    return Finding(Phase.FAILED, f"{retries_used(job.backoff_limit)}; the last attempt: {last}{hint}")


def _waiting(job: RayJobStatus, now_s: float, waits_for: str | None) -> Finding:
    """Nothing of it is there."""
    if job.suspended:
        if job.suspended_by_us:
            return Finding(Phase.SUSPENDED, "suspended")
        if job.kueue_queue is not None:
            return in_kueues_queue(job.kueue_queue, waits_for)
        return Finding(Phase.SUSPENDED, "its RayJob was suspended by somebody else")
    if job.num_failed:
        return Finding(Phase.BACKING_OFF, f"{job.num_failed} attempts failed; another follows")
    unseen_s = None if job.seen else age_s(job.created_at, now_s)
    if unseen_s is not None and unseen_s > UNSEEN_AFTER_S:
        return Finding(
            Phase.STUCK,
            f"no operator has looked at its RayJob for {int(unseen_s // 60)} min",
            "ask the administrator whether KubeRay's operator runs and watches this namespace",
        )
    return Finding(Phase.QUEUED, "KubeRay has not started a Ray cluster yet")


def _running(job: RayJobStatus, living: Sequence[PodFacts]) -> Finding:
    if job.job in ("SUCCEEDED", "FAILED", "STOPPED"):
        return Finding(Phase.EXECUTING, "the trainer has ended, and KubeRay is about to say so")
    nodes = sorted({pod.node for pod in living if pod.node})
    where = f" on {', '.join(nodes)}" if nodes else ""
    return Finding(Phase.EXECUTING, f"its Ray cluster {job.cluster} runs{where}")


def _starting(job: RayJobStatus, living: Sequence[PodFacts]) -> Finding:
    """The Ray cluster is being made."""
    for pod in living:
        if pod.trouble is not None:
            return Finding(Phase.STUCK, f"{pod.where}: {pod.trouble.reason}", pod.trouble.next_step)
    for pod in living:
        if pod.unschedulable is not None:
            held = sum(each.node is not None for each in living)
            holding = f"; {held} of its pods hold their nodes meanwhile" if held else ""
            return not_scheduled(pod.unschedulable, pod=pod.where, note=holding)
    again = f" after {job.num_failed} attempts that failed" if job.num_failed else ""
    phase = Phase.BACKING_OFF if job.num_failed else Phase.QUEUED
    num_running = sum(pod.phase == "Running" for pod in living)
    pods = f": {num_running} of its {len(living)} pods run" if living else ""
    return Finding(phase, f"its Ray cluster is being started{again}{pods}")


def decision(job: RayJobStatus) -> str | None:
    """What the operator did, or will do, after this attempt; None while it goes on."""
    if job.cancelled:
        return "not started again: cancelled"
    if job.deployment == "Complete":
        return "the run is complete" if job.job == "SUCCEEDED" else "not started again"
    if job.deployment == "Retrying":
        return (
            f"started again, charged: retry {min(job.num_failed, job.backoff_limit)} of {job.backoff_limit}"
        )
    if job.deployment == "Failed":
        return f"not started again: {_ended(job).reason}"
    if job.deployment in ("Suspending", "Suspended"):
        return "not started again before the run is resumed"
    return None


def _shortened(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _MAX_WORDS else f"{words[:_MAX_WORDS]}..."


def _text(above: Mapping[str, Any], key: str) -> str:
    return text(above, key) or ""
