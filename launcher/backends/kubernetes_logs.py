"""Attempts of a run on the cluster and their logs: the run directory's if it is readable, else the pods'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from influence.rundir import RunDirError, RunPaths, list_attempts
from launcher.backends.kubernetes_errors import ApiUnanswered
from launcher.backends.kubernetes_orders import Reader, RunObjects
from launcher.backends.pod_facts import CONTAINER, PodFacts
from launcher.backends.pod_log import PodLog
from launcher.backends.run_logs import logged_attempts, read_log_file


class AttemptLogs:
    """The logs of a namespace's runs; it remembers how far each was read."""

    def __init__(self, reader: Reader[RunObjects]) -> None:
        self._reader = reader
        self._pods: dict[str, dict[int, PodFacts]] = {}
        self._numbers: dict[str, dict[str, int]] = {}
        self._logs: dict[str, PodLog] = {}

    def attempts(self, run: str, paths: RunPaths | None) -> Sequence[int]:
        """The attempts that have a log: those of the run directory, else the pods in order of creation.

        While the server is away, those that were known before.
        """
        if paths is not None and (numbers := logged_attempts(paths)):
            return numbers
        return sorted(number for number, pod in self._numbered(run).items() if pod.started_at)

    def read(self, run: str, attempt: int, offset_bytes: int, paths: RunPaths | None) -> bytes:
        """As ``Backend.read_log``."""
        if paths is not None and logged_attempts(paths):
            return read_log_file(paths, attempt, offset_bytes)
        pod = (self._pods.get(run) or self._numbered(run)).get(attempt)
        if pod is None:
            return b""
        log = self._logs.get(pod.uid)
        if log is None or offset_bytes < log.position:
            log = self._logs[pod.uid] = PodLog(partial(self._open, pod.name))
        log.ended = pod.ended
        return log.read(offset_bytes)

    def _numbered(self, run: str) -> Mapping[int, PodFacts]:
        try:
            jobs = self._reader.objects_and_pods(run)
        except ApiUnanswered:
            if run not in self._pods:
                raise
            return self._pods[run]
        present = [] if jobs is None else jobs.attempt_pods()
        # One that was evicted is gone without a trace, and must not lend its number to the next.
        numbers = self._numbers.setdefault(run, {})
        for pod in present:
            numbers.setdefault(pod.uid, len(numbers) + 1)
        self._pods[run] = {numbers[pod.uid]: pod for pod in present}
        for uid in self._logs.keys() - {pod.uid for pod in present}:
            self._logs[uid].ended = True
        return self._pods[run]

    def _open(self, pod: str, since: str | None, follow: bool) -> Iterator[bytes]:
        return self._reader.api.stream_log(
            self._reader.namespace, pod, container=CONTAINER, since_time=since, follow=follow
        )


def attempt_numbers(paths: RunPaths | None, pods: Sequence[str]) -> dict[str, int]:
    """The number of each pod's attempt: the one that the trainer claimed, where its records can be read.

    Args:
        pods: the names of all of the run's, the oldest first.
    """
    if paths is not None and paths.run_json.is_file():
        try:
            return {record.pod: record.number for record in list_attempts(paths) if record.pod is not None}
        except RunDirError:
            pass
    return {pod: number for number, pod in enumerate(pods, start=1)}
