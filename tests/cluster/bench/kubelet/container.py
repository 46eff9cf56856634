"""One container: a process, its log, and what Kubernetes is told about it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.bench import processes
from tests.cluster.bench.kubelet import logfile, times
from tests.cluster.bench.kubelet.logfile import LogWriter

Json = dict[str, Any]

#: In the environment of all processes of a pod: ``BENCH/pods/UID/CONTAINER/``, by which they are found.
POD_VARIABLE = "INFL_BENCH_POD"
_START_FAILED = 128  # container runtimes' exit code for a command that cannot be executed
_LAST_WORDS_S = 2.0  # for a pipe that a process without our marker still holds
_MESSAGE_LINES, _MESSAGE_BYTES = 80, 2048


class Container:
    """A container through all its restarts; not thread-safe but for ``signal``."""

    def __init__(self, spec: Json, pod_folder: Path, *, is_init: bool) -> None:
        self.spec = spec
        self.name: str = spec["name"]
        self.is_init = is_init
        self.is_sidecar = is_init and spec.get("restartPolicy") == "Always"
        self.num_restarts = 0
        self.state: Json = {"waiting": {"reason": "PodInitializing" if is_init else "ContainerCreating"}}
        self.last_state: Json = {}
        self.ended = threading.Event()
        """No further start will follow."""
        self._folder = pod_folder
        self._process: subprocess.Popen[bytes] | None = None
        self._killed_by_us = False
        self._beside: set[int] = set()
        self._lock = threading.Lock()

    @property
    def marker(self) -> str:
        return f"{self._folder / self.name}/"

    @property
    def exit_code(self) -> int | None:
        """Of the last run; None while it runs or before it ever did."""
        code: int | None = self.state.get("terminated", {}).get("exitCode")
        return code

    def log(self, num_restarts: int | None = None) -> Path:
        number = self.num_restarts if num_restarts is None else num_restarts
        return self._folder / f"{self.name}.{number}.log"

    def start(self, command: Sequence[str], environment: dict[str, str], folder: Path) -> None:
        """The process's state is ``running`` afterwards, or ``terminated`` where it cannot be executed."""
        started_at = times.seconds()
        try:
            process = subprocess.Popen(
                command,
                env={**environment, POD_VARIABLE: self.marker},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=processes.die_with_parent,
            )
        except (OSError, IndexError, ValueError) as error:
            self.state = self._terminated(_START_FAILED, "StartError", str(error), started_at)
            return
        assert process.stdout is not None
        self._writer = LogWriter(process.stdout, self.log())
        with self._lock:
            self._process = process
        (self._folder / f"{self.name}.pid").write_text(str(process.pid))
        self.state = {"running": {"startedAt": started_at}}

    def wait(self) -> None:
        """Until the process has ended, whereupon whatever it left behind is killed.

        To be called in the thread that called ``start``, with which the process would die.
        """
        if self._process is None:
            return
        code = self._process.wait()
        with self._lock:
            self._process = None
        processes.kill_carrying(POD_VARIABLE, self.marker, waited_for=self._beside)
        self._writer.join(_LAST_WORDS_S)
        started_at = self.state["running"]["startedAt"]
        if code == 0:
            reason = "Completed"
        elif code == -signal.SIGKILL and not self._killed_by_us:
            reason = "OOMKilled"  # nobody else kills on a node
        else:
            reason = "Error"
        message = ""
        if code != 0 and self.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            message = logfile.tail(self.log(), _MESSAGE_LINES, _MESSAGE_BYTES)
        self.state = self._terminated(code if code >= 0 else 128 - code, reason, message, started_at)

    @contextlib.contextmanager
    def beside(
        self, command: Sequence[str], environment: dict[str, str]
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A further process in the container, with pipes; it ends with the container at the latest.

        Raises:
            OSError: the command cannot be executed.
        """
        with subprocess.Popen(
            command,
            env={**environment, POD_VARIABLE: self.marker},
            cwd=self._folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            self._beside.add(process.pid)
            try:
                yield process
                process.wait()
            finally:
                self._beside.discard(process.pid)

    def restart_later(self, wait_s: float) -> None:
        """Counts a restart; its wait is for the caller."""
        message = f"back-off {wait_s:g}s restarting failed container={self.name}"
        self.last_state, self.state = (
            self.state,
            {"waiting": {"reason": "CrashLoopBackOff", "message": message}},
        )
        self.num_restarts += 1

    def never_started(self) -> None:
        """Its pod ends before it could run."""
        if "waiting" in self.state:
            message = "The container could not be located when the pod was terminated"
            now = times.seconds()
            self.state = self._terminated(137, "ContainerStatusUnknown", message, now)

    def signal(self, number: signal.Signals) -> None:
        """To the first process, as container runtimes do; SIGKILL thereby to all."""
        with self._lock:
            if self._process is not None:
                self._killed_by_us |= number == signal.SIGKILL
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(number)

    def status(self) -> Json:
        """A v1.ContainerStatus."""
        running = "running" in self.state
        return {
            "name": self.name,
            "image": self.spec.get("image", ""),
            "imageID": "",
            "containerID": "" if "waiting" in self.state else f"process://{self._folder.name}/{self.name}",
            "restartCount": self.num_restarts,
            "ready": running and (self.is_sidecar or not self.is_init),
            "started": running,
            "state": self.state,
            "lastState": self.last_state,
        }

    def _terminated(self, code: int, reason: str, message: str, started_at: str) -> Json:
        state = {"exitCode": code, "reason": reason, "startedAt": started_at, "finishedAt": times.seconds()}
        return {"terminated": state | ({"message": message} if message else {})}
