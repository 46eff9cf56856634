"""A Ray cluster of two nodes on this machine: two raylets with a place for one rank each."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from influence.tiny.cache import cache_root
from influence.verl_engine.environment import bytecode_environment, ray_environment

MARK = "INFL_TEST_RAY_NODE"
"""In the environment of a node's processes: which cluster, and which node of it."""

_NUM_CPUS = 16  # as Ray counts them: verl's actors must find room, and hardly compute at the same time
_OBJECT_STORE_BYTES = 100 * 2**20
_START_TIMEOUT_S = 60


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"waited in vain for {what}"
        time.sleep(0.05)


class TwoRaylets:
    """Ray's head and one more node, each ``ray start --block`` in a process group of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        self.authentication = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        # A folder of its own, or every other Ray on this machine would find this cluster; a short one, since
        # the names of sockets are limited.
        self._temp_dir = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        self._start(
            "head",
            ["--head", f"--port={self._port}", "--include-dashboard=false", f"--temp-dir={self._temp_dir}"],
        )
        wait_until(self._head_answers, "Ray's head", _START_TIMEOUT_S)
        self.start_worker()

    def start_worker(self) -> None:
        self._start("worker", [f"--address={self.address}"])

    def kill_worker(self) -> None:
        """As a machine that loses its power: every process of the node at once, without a word."""
        for pid in self.processes_of("worker"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._nodes.pop("worker").wait()

    def stop(self) -> None:
        for name in ("worker", "head"):
            for pid in self.processes_of(name):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if name in self._nodes:
                self._nodes.pop(name).wait()
        shutil.rmtree(self._temp_dir, ignore_errors=True)

    def processes_of(self, name: str) -> list[int]:
        """Every process that descends from a node's."""
        return processes_marked(f"{MARK}={self._mark(name)}")

    def _mark(self, name: str) -> str:
        return f"{self._port}-{name}"

    def _start(self, name: str, options: list[str]) -> None:
        log = (self._directory / f"ray-{name}.log").open("ab")
        self._nodes[name] = subprocess.Popen(
            [
                sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--block",
                f"--num-cpus={_NUM_CPUS}", "--num-gpus=1", f"--object-store-memory={_OBJECT_STORE_BYTES}",
                "--node-ip-address=127.0.0.1", "--disable-usage-stats", *options,
            ],
            env=self._environment(name),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        log.close()

    def _environment(self, name: str) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        # A lost node is noticed in seconds, where Ray's defaults take half a minute.
        health = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 1000, "failure_threshold": 3}
        return {
            **inherited,
            **ray_environment(),
            **bytecode_environment(os.environ, cache_root()),
            **self.authentication,
            **{f"RAY_health_check_{key}": json.dumps(value) for key, value in health.items()},
            MARK: self._mark(name),
            "OMP_NUM_THREADS": "1",
        }

    def _head_answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0


def processes_marked(mark: str) -> list[int]:
    """The processes with ``NAME=value`` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
