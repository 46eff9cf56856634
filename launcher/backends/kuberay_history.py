"""The story of a run on KubeRay: what became of each Ray cluster, and the events of all its objects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from influence.rundir import RunPaths
from influence.rundir.exits import Verdict
from launcher.backends import AttemptFacts, Event
from launcher.backends.kuberay_reading import RayJobReader, RayPod, RunRayJobs
from launcher.backends.kubernetes_errors import api_path
from launcher.backends.kubernetes_history import event
from launcher.backends.kubernetes_logs import attempt_numbers
from launcher.backends.kubernetes_reading import event_time
from launcher.backends.rayjob_facts import RayJobStatus, decision

_MADE_FOR_IT = re.compile(r"-[a-z0-9]{5}(-.+)?")
_CREATED, _DELETED = "CreatedRayCluster", "DeletedRayCluster"


def history(reader: RayJobReader, run: str, paths: RunPaths | None) -> Sequence[AttemptFacts]:
    """As ``Backend.history``.

    The pods of a Ray cluster go with it. Of those that are gone the trainer's own records speak where the run
    directory is readable, else the operator's events, while the server keeps them.
    """
    rayjobs = reader.objects_and_pods(run)
    if rayjobs is None:
        return []
    heads = [pod for pod in rayjobs.pods if pod.is_head]
    numbers = attempt_numbers(paths, [pod.facts.name for pod in heads])
    statuses = {generation.name: RayJobStatus.of(generation.item) for generation in rayjobs.generations}
    found = [_of_head(pod, statuses.get(pod.rayjob), numbers.get(pod.facts.name)) for pod in heads]
    if paths is None:
        found += _of_clusters_gone(_events(reader, rayjobs), {pod.cluster for pod in heads})
        found.sort(key=lambda facts: facts.started_at or "")
    return found


def _of_head(pod: RayPod, status: RayJobStatus | None, number: int | None) -> AttemptFacts:
    """The RayJob's status speaks of its present cluster only."""
    facts = pod.facts
    current = status if status is not None and status.cluster == pod.cluster else None
    ended_by = (current.ended_by if current else None) or facts.ended_by
    verdict = None
    if ended_by is not None:
        verdict = Verdict.DONE if current and current.job == "SUCCEEDED" else Verdict.CHARGED_RETRY
    return AttemptFacts(
        where=f"Ray cluster {pod.cluster}, head {facts.where.removeprefix('pod ')}",
        number=number,
        pod=facts.name,
        started_at=facts.started_at or facts.created_at,
        ended_at=(current.ended_at if current else None) or facts.ended_at if ended_by else None,
        exit_code=current.exit_code if current else None,
        ended_by=ended_by,
        verdict=verdict,
        decision=decision(current) if current and ended_by else None,
    )


def _of_clusters_gone(items: Sequence[Mapping[str, Any]], present: set[str]) -> Iterator[AttemptFacts]:
    times: dict[str, dict[str, str]] = {}
    for item in items:
        reason = str(item.get("reason") or "")
        if reason in (_CREATED, _DELETED):
            cluster = str(item.get("message") or "").rpartition("/")[2]
            times.setdefault(cluster, {})[reason] = event_time(item)
    for cluster, at in times.items():
        if cluster not in present and _DELETED in at:
            yield AttemptFacts(
                where=f"Ray cluster {cluster}",
                started_at=at.get(_CREATED),
                ended_at=at[_DELETED],
                ended_by="its pods are gone, and nothing here says why",
            )


def events(reader: RayJobReader, run: str) -> Sequence[Event]:
    """As ``Backend.events``: of the RayJobs and all that controllers made for them."""
    rayjobs = reader.objects(run)
    return [] if rayjobs is None else [event(item) for item in _events(reader, rayjobs)]


def _events(reader: RayJobReader, rayjobs: RunRayJobs) -> list[Mapping[str, Any]]:
    names = [generation.name for generation in rayjobs.generations]

    def is_ours(about: Mapping[str, Any]) -> bool:
        kind, name = about.get("kind"), str(about.get("name", ""))
        if kind == "RayJob":
            return name in names
        bare = name.removeprefix("rayjob-").removeprefix("pg-")  # Kueue's and KAI's prefixes
        return any(bare.startswith(own) and _MADE_FOR_IT.fullmatch(bare[len(own) :]) for own in names)

    items = reader.api.list(api_path("v1", "events", namespace=reader.namespace)).get("items") or []
    return sorted((item for item in items if is_ours(item.get("involvedObject") or {})), key=event_time)
