"""The story of a run on the cluster: what became of each pod, and the events of all its objects."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from influence.rundir import RunPaths
from influence.rundir.exits import Verdict
from launcher.backends import AttemptFacts, Event
from launcher.backends.job_facts import JobStatus, decisions, last_decision, stopped_because
from launcher.backends.kubernetes_errors import ApiForbidden, api_path
from launcher.backends.kubernetes_logs import attempt_numbers
from launcher.backends.kubernetes_reading import JobReader, RunJobs, event_time

# The ends of names that controllers append: pods and Kueue's Workloads (5), PodGroups of KAI (a UID).
_MADE_FOR_A_JOB = r"(job-|pg-)?{name}(-[a-z0-9]{{5}}|-[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}})"
_CREATED, _DELETED = re.compile(r"Created pod: (\S+)"), re.compile(r"Deleted pod: (\S+)")
_TAKEN_AWAY = {
    "Preempted": "preempted",
    "Evicted": "evicted",
    "TaintManagerEviction": "evicted: its node got a taint that it does not tolerate",
}

Json = Mapping[str, Any]


def events(reader: JobReader, run: str) -> Sequence[Event]:
    """As ``Backend.events``: of the Jobs, their pods and what schedulers make for them."""
    jobs = reader.objects(run)
    if jobs is None:
        return []
    statuses = [JobStatus.of(generation.item) for generation in jobs.generations]
    cancelled = {f"Job {status.name}" for status in statuses if status.cancelled}
    return [_as_meant(event(item), cancelled) for item in _events_of(reader, jobs)]


def history(reader: JobReader, run: str, paths: RunPaths | None) -> Sequence[AttemptFacts]:
    """As ``Backend.history``, of the pods that the cluster still has or tells of in its events.

    A pod that was evicted, preempted or suspended is deleted once it has stopped: its events speak of it for
    an hour or so, and then the run directory alone.
    """
    jobs = reader.objects_and_pods(run)
    if jobs is None:
        return []
    try:
        told = _events_of(reader, jobs)
    except ApiForbidden:
        told = []
    attempts: list[AttemptFacts] = []
    for generation in jobs.generations:
        status = JobStatus.of(generation.item)
        pods = list(jobs.pods.get(status.uid, ()))
        aged = [
            (pod.order, pod.attempt(number=None, decision=decision))
            for pod, decision in zip(pods, decisions(status, pods), strict=True)
        ]
        present = {pod.name for pod in pods}
        num_charged = sum(pod.verdict in (Verdict.CHARGED_RETRY, Verdict.FATAL) for pod in pods)
        created = _created_pods(told, generation.name)
        for name, at in created.items():
            if name not in present:
                newest = name == list(created)[-1] and all(pod.created_at < at for pod in pods)
                gone = _gone(
                    name, at, told, status, newest=newest, uncharged=num_charged >= status.num_failed
                )
                aged.append(((at, gone.ended_at or "", name), gone))
        attempts += [attempt for _, attempt in sorted(aged, key=lambda each: each[0])]
    numbers = attempt_numbers(paths, [attempt.pod or "" for attempt in attempts])
    return [replace(attempt, number=numbers.get(attempt.pod or "")) for attempt in attempts]


def _created_pods(told: Sequence[Json], job: str) -> dict[str, str]:
    """The pods that the Job controller says it created, with the times."""
    found = {}
    for item in told:
        if item.get("reason") == "SuccessfulCreate" and _about(item).get("name") == job:
            created = _CREATED.search(str(item.get("message")))
            if created:
                found[created[1]] = event_time(item)
    return found


def _gone(
    name: str, created_at: str, told: Sequence[Json], status: JobStatus, *, newest: bool, uncharged: bool
) -> AttemptFacts:
    """A pod of which only events are left.

    Args:
        status: its Job's.
        newest: whether the Job has had no later pod.
        uncharged: whether all charged failures are those of other pods.
    """
    own = [item for item in told if _about(item).get("kind") == "Pod" and _about(item).get("name") == name]
    by_controller = [
        item for item in told
        if item.get("reason") == "SuccessfulDelete" and name in _DELETED.findall(str(item.get("message")))
    ]  # fmt: skip
    decision = "not charged" if uncharged else None
    taken = next((item for item in reversed(own) if item.get("reason") in _TAKEN_AWAY), None)
    if taken is not None:
        ended_by = f"{_TAKEN_AWAY[str(taken['reason'])]}: {str(taken.get('message') or '').strip()}"
    elif by_controller:
        ended_by = stopped_because(status, newest=newest)
        decision = last_decision(status) if newest else "started again" + (", not charged" * uncharged)
    else:
        ended_by = "evicted or deleted; the cluster keeps nothing more of it"
    return AttemptFacts(
        where=f"pod {name}",
        pod=name,
        started_at=created_at,
        ended_at=max(map(event_time, [*own, *by_controller]), default=None),
        ended_by=ended_by,
        verdict=Verdict.FREE_RETRY if uncharged else None,
        decision=decision,
    )


def _events_of(reader: JobReader, jobs: RunJobs) -> list[Json]:
    """The oldest first. One question: the API selects by one object's name, and a run has many."""
    names = [generation.name for generation in jobs.generations]
    made = re.compile("|".join(_MADE_FOR_A_JOB.format(name=re.escape(name)) for name in names))
    items = reader.api.list(api_path("v1", "events", namespace=reader.namespace)).get("items") or []

    def is_ours(item: Json) -> bool:
        about = _about(item)
        name = str(about.get("name", ""))
        return name in names if about.get("kind") == "Job" else made.fullmatch(name) is not None

    return sorted(filter(is_ours, items), key=_age)


def _age(item: Json) -> tuple[str, int]:
    """Some events have times in whole seconds only; within one, the order of their creation counts."""
    version = str((item.get("metadata") or {}).get("resourceVersion", ""))
    return event_time(item)[:19], int(version) if version.isdecimal() else 0


def _about(item: Json) -> Json:
    return item.get("involvedObject") or {}


def _as_meant(told: Event, cancelled: Collection[str]) -> Event:
    """A cancelled Job is ended by way of its deadline, which its controller reports as a deadline missed."""
    if told.reason != "DeadlineExceeded" or told.about not in cancelled:
        return told
    return replace(
        told, warning=False, message=f"by `launcher cancel`, which sets a deadline: {told.message}"
    )


def event(item: Json) -> Event:
    about, series = _about(item), item.get("series") or {}
    return Event(
        at=event_time(item),
        about=f"{about.get('kind')} {about.get('name')}",
        reason=str(item.get("reason") or ""),
        message=str(item.get("message") or "").strip(),
        warning=item.get("type") == "Warning",
        count=max(1, int(series.get("count") or item.get("count") or 1)),
    )
