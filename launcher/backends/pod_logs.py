"""The logs of runs whose attempts are pods: from the run directory, else from the pods themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from influence.rundir import RunPaths
from launcher.backends.kubernetes_errors import ApiUnanswered
from launcher.backends.pod_facts import CONTAINER, PodFacts
from launcher.backends.pod_log import PodLog
from launcher.backends.run_logs import claimed, logged_attempts, read_log_file


@dataclass(frozen=True, slots=True)
class LoggedPod:
    """A pod, and the container whose log is the attempt's."""

    facts: PodFacts
    container: str = CONTAINER

    @property
    def key(self) -> str:
        """Tells pods apart: some controllers give one the name of another that is gone."""
        return self.facts.uid or self.facts.name


Look = Callable[[str], Sequence[LoggedPod]]
"""The pods that a run has now, the oldest first; raises ApiUnanswered while nobody can tell."""
OpenLog = Callable[[LoggedPod, str | None, bool], Iterator[bytes]]
"""A pod's log as ``pod_log.OpenStream`` opens it."""
Order = Callable[[str], Sequence[str]]
"""The names of all pods that a run is known to have had, the oldest first."""


class PodLogs:
    """The logs of many runs; it remembers how far each was read.

    Where a run's logs were first found, there they are read from then on: a number that means one pod while
    nothing is claimed would mean another as soon as the run directory shows the trainer's own.

    Args:
        order: asked once a run, for the numbers of pods that are gone already.
    """

    def __init__(self, look: Look, open_log: OpenLog, order: Order | None = None) -> None:
        self._look = look
        self._open = open_log
        self._order = order
        self._runs: dict[str, _Pods] = {}
        self._by_pods: set[str] = set()

    def attempts(self, run: str, paths: RunPaths | None) -> Sequence[int]:
        """The attempts that have a log: those of the run directory, else the pods in order of creation.

        While the server is away, those that were known before.
        """
        if paths is not None and self._in_directory(run, paths):
            return logged_attempts(paths)
        attempts = self._looked(run).attempts()
        if attempts:
            self._by_pods.add(run)
        return attempts

    def read(self, run: str, attempt: int, offset_bytes: int, paths: RunPaths | None) -> bytes:
        """As ``Backend.read_log``."""
        if paths is not None and self._in_directory(run, paths):
            return read_log_file(paths, attempt, offset_bytes)
        return (self._runs.get(run) or self._looked(run)).read(attempt, offset_bytes)

    def _in_directory(self, run: str, paths: RunPaths) -> bool:
        return run not in self._by_pods and claimed(paths)

    def _looked(self, run: str) -> _Pods:
        pods = self._runs.get(run)
        try:
            if pods is None:
                pods = _Pods(self._open, [] if self._order is None else self._order(run))
            pods.see(self._look(run))
        except ApiUnanswered:
            if run not in self._runs:
                raise
            return self._runs[run]
        self._runs[run] = pods
        return pods


class _Pods:
    """The pods of one run by the numbers that stand for them, also when they are gone."""

    def __init__(self, open_log: OpenLog, order: Sequence[str]) -> None:
        self._open = open_log
        self._names = {name: number for number, name in enumerate(order, start=1)}
        self._highest = len(self._names)
        self._numbers: dict[str, int] = {}
        self._pods: dict[int, LoggedPod] = {}
        self._present: set[int] = set()
        self._logs: dict[int, PodLog] = {}

    def see(self, present: Sequence[LoggedPod]) -> None:
        """These are there now, and those that were there before and are not among them are gone."""
        self._present = set()
        for pod in present:
            number = self._numbers.get(pod.key)
            if number is None:
                # A name is one pod's only: the next that has it is another attempt.
                number = self._numbers[pod.key] = self._names.pop(pod.facts.name, self._highest + 1)
                self._highest = max(self._highest, number)
            self._pods[number] = pod
            self._present.add(number)
        for number, log in self._logs.items():
            log.gone = number not in self._present
            log.ended = log.gone or self._pods[number].facts.ended

    def attempts(self) -> list[int]:
        """Of a pod that is gone there is what a log that was being read still holds."""
        return [
            number
            for number, pod in sorted(self._pods.items())
            if pod.facts.started_at and (number in self._present or number in self._logs)
        ]

    def read(self, number: int, offset_bytes: int) -> bytes:
        pod, log = self._pods.get(number), self._logs.get(number)
        if pod is None or (log is None and number not in self._present):
            return b""
        if log is None or offset_bytes < log.position:
            log = self._logs[number] = PodLog(partial(self._open, pod))
            log.gone = number not in self._present
            log.ended = log.gone or pod.facts.ended
        return log.read(offset_bytes)
