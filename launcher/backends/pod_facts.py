"""What a pod's status says: how far it came, what holds it up, what ended it.

Pure functions of the API's JSON. Nothing here raises for a status that is incomplete: controllers, kubelets
and schedulers write it piece by piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from influence.rundir.clock import parse_time
from influence.rundir.exits import Verdict, classify, describe
from launcher.backends import AttemptFacts
from launcher.backends.api_fields import mapping, mappings, text

CONTAINER = "trainer"
LOST_AFTER_S = 300.0
"""A pod that is still there this long after its grace period is on a node that does not answer."""
_OOM_CODE = 137


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a pod does not come to run, and what a person can do."""

    reason: str
    next_step: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PodFacts:
    """One pod of a run."""

    name: str
    uid: str
    node: str | None
    created_at: str
    """RFC 3339, UTC, as all times here."""
    phase: str
    """Kubernetes' own: Pending, Running, Succeeded, Failed, Unknown."""
    started_at: str | None = None
    """When the trainer's container started."""
    ended_at: str | None = None
    exit_code: int | None = None
    out_of_memory: bool = False
    """The kernel killed the container at its memory limit."""
    disruption: str | None = None
    """Who took the pod away, in words: an eviction, a preemption, a drain; None where nobody did."""
    unschedulable: str | None = None
    """The scheduler's words."""
    trouble: Trouble | None = None
    waiting: str | None = None
    """What the container waits for: ``ContainerCreating``."""
    delete_by: str | None = None
    """When its grace period ends; None where nobody deletes it."""
    failure: str | None = None
    """The pod's own reason, where it failed as a whole: ``Evicted: The node was low on memory``."""

    @property
    def ended(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def order(self) -> tuple[str, str, str]:
        """Sorts the pods of a Job by age; times are whole seconds, and one pod follows the end of another."""
        return self.created_at, (self.ended_at or "") if self.ended else "~", self.name

    def deletion_overdue(self, now_s: float) -> bool:
        """Whether it should have been gone for ``LOST_AFTER_S``: its node does not answer."""
        by_s = None if self.delete_by is None else _seconds(self.delete_by)
        return not self.ended and by_s is not None and now_s > by_s + LOST_AFTER_S

    @property
    def where(self) -> str:
        return f"pod {self.name}" + (f" on node {self.node}" if self.node else "")

    @property
    def verdict(self) -> Verdict | None:
        """How the exit table, and so the Job's failure policy, counts its end; None while it goes on."""
        if not self.ended:
            return None
        if self.phase == "Succeeded":
            return Verdict.DONE
        if self.disruption is not None:
            return Verdict.FREE_RETRY
        return Verdict.CHARGED_RETRY if not self.exit_code else classify(self.exit_code)

    @property
    def ended_by(self) -> str | None:
        """What ended it, in words; None while it goes on."""
        if not self.ended:
            return None
        exit_words = None if self.exit_code is None else describe(self.exit_code)
        if self.disruption is not None:
            return self.disruption + (f"; the trainer {exit_words}" if self.exit_code else "")
        if self.out_of_memory:
            return f"out of memory: the container reached its memory limit ({_OOM_CODE})"
        return self.failure or exit_words or "failed without a word about its container"

    def attempt(self, *, number: int | None, decision: str | None) -> AttemptFacts:
        """The pod as an attempt of its run."""
        return AttemptFacts(
            where=self.where,
            number=number,
            pod=self.name,
            started_at=self.started_at or self.created_at,
            ended_at=self.ended_at if self.ended else None,
            begun=self.started_at is not None or self.ended or self.phase == "Running",
            exit_code=self.exit_code,
            ended_by=self.ended_by,
            verdict=self.verdict,
            decision=decision,
        )


def pod_facts(pod: Mapping[str, Any], *, container: str = CONTAINER) -> PodFacts:
    """What the API's JSON of a pod says.

    Args:
        container: the name of the container that is the attempt.
    """
    metadata, spec, status = mapping(pod, "metadata"), mapping(pod, "spec"), mapping(pod, "status")
    own = _container_status(status, container)
    state = mapping(own, "state")
    terminated, running = mapping(state, "terminated"), mapping(state, "running")
    conditions = {str(c.get("type")): c for c in mappings(status, "conditions")}
    scheduled, disrupted = conditions.get("PodScheduled", {}), conditions.get("DisruptionTarget", {})
    waiting = _first_waiting(status)
    return PodFacts(
        name=_text(metadata, "name") or "?",
        uid=_text(metadata, "uid") or "",
        node=_text(spec, "nodeName"),
        created_at=_text(metadata, "creationTimestamp") or "",
        phase=_text(status, "phase") or "Pending",
        started_at=_text(running, "startedAt") or _text(terminated, "startedAt"),
        ended_at=_text(terminated, "finishedAt") or _last_transition(conditions),
        exit_code=_integer(terminated.get("exitCode")),
        out_of_memory=terminated.get("reason") == "OOMKilled",
        disruption=_disruption(disrupted, status),
        unschedulable=(_text(scheduled, "message") or "the scheduler found no node")
        if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
        else None,
        trouble=_trouble(waiting, spec, container),
        waiting=_text(waiting, "reason"),
        delete_by=_text(metadata, "deletionTimestamp"),
        failure=_failure(status),
    )


def _container_status(status: Mapping[str, Any], container: str) -> Mapping[str, Any]:
    return next((c for c in mappings(status, "containerStatuses") if c.get("name") == container), {})


def _first_waiting(status: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state of the first container that waits; init containers come before the others."""
    for each in (*mappings(status, "initContainerStatuses"), *mappings(status, "containerStatuses")):
        waiting = mapping(mapping(each, "state"), "waiting")
        if waiting and waiting.get("reason") != "PodInitializing":
            return {**waiting, "image": each.get("image")}
    return {}


_IMAGE_REASONS = frozenset((
    "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
    "RegistryUnavailable", "SignatureValidationFailed",
))  # fmt: skip
_START_REASONS = {
    "CreateContainerConfigError": (
        "its container cannot be configured",
        "create the Secret that it names, or correct cluster.secret; the pod then starts by itself",
    ),
    "CreateContainerError": (
        "its container cannot be created",
        "see `launcher events`; the image may lack python, or a volume may be wrong",
    ),
    "RunContainerError": ("its container cannot be started", "check that the image holds the trainer"),
}


def _trouble(waiting: Mapping[str, Any], spec: Mapping[str, Any], container: str) -> Trouble | None:
    reason, message = _text(waiting, "reason"), _text(waiting, "message")
    if reason in _IMAGE_REASONS:
        image = next(
            (_text(c, "image") for c in mappings(spec, "containers") if c.get("name") == container), None
        ) or _text(waiting, "image")
        return Trouble(
            f"the image {image} cannot be pulled: {message or reason}",
            "check cluster.image and its tag, and cluster.image_pull_secrets for a private registry; the pod "
            "starts by itself once the registry delivers it",
        )
    if reason in _START_REASONS:
        what, next_step = _START_REASONS[reason]
        return Trouble(f"{what}: {message or reason}", next_step)
    return None


_DISRUPTIONS = {
    "PreemptionByScheduler": "preempted: a pod of higher priority needed the place",
    "PreemptionByKubeScheduler": "preempted: a pod of higher priority needed the place",
    "DeletionByTaintManager": "evicted: its node got a taint that it does not tolerate",
    "EvictionByEvictionAPI": "evicted: its node was drained, or somebody evicted the pod",
    "DeletionByPodGC": "its node is gone",
    "TerminationByKubelet": "its node took it down",
}


def _disruption(condition: Mapping[str, Any], status: Mapping[str, Any]) -> str | None:
    if condition.get("status") != "True":
        return None
    reason, message = _text(condition, "reason"), _text(condition, "message")
    words = _DISRUPTIONS.get(reason or "", f"disrupted ({reason})")
    pod_message = _text(status, "message") if reason == "TerminationByKubelet" else None
    return f"{words}: {pod_message or message}" if pod_message or message else words


def _failure(status: Mapping[str, Any]) -> str | None:
    reason, message = _text(status, "reason"), _text(status, "message")
    if reason == "Evicted":
        return f"evicted by its node: {message or 'it ran short of something'}"
    if reason == "DeadlineExceeded":
        return "stopped: the pod's deadline has passed"
    return f"{reason}: {message}" if reason and message else reason or message


def _last_transition(conditions: Mapping[str, Mapping[str, Any]]) -> str | None:
    return _text(conditions.get("Ready", {}), "lastTransitionTime")


def age_s(at: str | None, now_s: float) -> float | None:
    """Seconds since a time of the API; None where there is none, or none that can be read."""
    then_s = None if at is None else _seconds(at)
    return None if then_s is None else now_s - then_s


def _seconds(at: str) -> float | None:
    try:
        moment: datetime = parse_time(at)
    except ValueError:
        return None
    return moment.timestamp()


def _text(above: Mapping[str, Any], key: str) -> str | None:
    return (text(above, key) or "").strip() or None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255 else None
