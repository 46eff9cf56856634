"""Attempts of a run on the cluster and their logs: the run directory's if it is readable, else the pods'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from influence.rundir import RunDirError, RunPaths
from launcher.backends.attempt_records import readable_records
from launcher.backends.pod_logs import LoggedPod, Order, PodLogs
from launcher.backends.run_logs import claimed
from launcher.backends.server_reader import Reader, RunObjects


def attempt_logs(reader: Reader[RunObjects], order: Order | None = None) -> PodLogs:
    """The logs of a namespace's runs.

    Args:
        order: as ``PodLogs`` takes it.
    """

    def look(run: str) -> list[LoggedPod]:
        objects = reader.objects_and_pods(run)
        return [] if objects is None else [LoggedPod(pod) for pod in objects.attempt_pods()]

    def open_log(pod: LoggedPod, since: str | None, follow: bool) -> Iterator[bytes]:
        return reader.api.stream_log(
            reader.namespace, pod.facts.name, container=pod.container, since_time=since, follow=follow
        )

    return PodLogs(look, open_log, order)


def attempt_numbers(paths: RunPaths | None, pods: Sequence[str]) -> dict[str, int]:
    """The number of each pod's attempt: the one that the trainer claimed, once any claims can be read.

    Numbers are then never counted, though a record be torn: the same number would mean another pod.

    Args:
        pods: the names of all of the run's, the oldest first.
    """
    try:
        if paths is not None and claimed(paths):
            return {record.pod: number for number, record in readable_records(paths).items() if record.pod}
    except RunDirError:
        return {}
    return {pod: number for number, pod in enumerate(pods, start=1)}
