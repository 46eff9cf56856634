"""The story of a run on the cluster: what became of each pod, and the events of all its objects."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from influence.rundir import RunPaths
from launcher.backends import AttemptFacts, Event
from launcher.backends.job_facts import JobStatus, decisions
from launcher.backends.kubernetes_errors import api_path
from launcher.backends.kubernetes_logs import attempt_numbers
from launcher.backends.kubernetes_reading import JobReader, RunJobs, event_time

# The ends of names that controllers append: pods (5), Kueue's Workloads (5), KAI's PodGroups (the Job's UID).
_MADE_FOR_A_JOB = r"(job-|pg-)?{name}(-[a-z0-9]{{5}}|-[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}})"


def history(reader: JobReader, run: str, paths: RunPaths | None) -> Sequence[AttemptFacts]:
    """As ``Backend.history``, of the pods that the cluster still has."""
    jobs = reader.jobs_and_pods(run)
    if jobs is None:
        return []
    numbers = attempt_numbers(paths, jobs.all_pods())
    decided: dict[str, str | None] = {}
    for generation in jobs.generations:
        status = JobStatus.of(generation.item)
        pods = jobs.pods.get(status.uid, ())
        decided.update(zip((pod.name for pod in pods), decisions(status, pods), strict=True))
    return [
        pod.attempt(number=numbers.get(pod.name), decision=decided.get(pod.name)) for pod in jobs.all_pods()
    ]


def events(reader: JobReader, run: str) -> Sequence[Event]:
    """As ``Backend.events``: of the Jobs, their pods and what schedulers make for them."""
    jobs = reader.jobs(run)
    if jobs is None:
        return []
    is_ours = _filter(jobs)
    items = reader.api.list(api_path("v1", "events", namespace=reader.namespace)).get("items") or []
    ours = [item for item in items if is_ours(item.get("involvedObject") or {})]
    return [_event(item) for item in sorted(ours, key=event_time)]


def _filter(jobs: RunJobs) -> Any:
    names = [generation.name for generation in jobs.generations]
    made = re.compile("|".join(_MADE_FOR_A_JOB.format(name=re.escape(name)) for name in names))

    def is_ours(about: Mapping[str, Any]) -> bool:
        name = str(about.get("name", ""))
        return name in names if about.get("kind") == "Job" else made.fullmatch(name) is not None

    return is_ours


def _event(item: Mapping[str, Any]) -> Event:
    about, series = item.get("involvedObject") or {}, item.get("series") or {}
    return Event(
        at=event_time(item),
        about=f"{about.get('kind')} {about.get('name')}",
        reason=str(item.get("reason") or ""),
        message=str(item.get("message") or "").strip(),
        warning=item.get("type") == "Warning",
        count=max(1, int(series.get("count") or item.get("count") or 1)),
    )
