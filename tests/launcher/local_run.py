"""Runs of a small fake trainer, supervised for real."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from influence.rundir import RunDirError, RunPaths, RunSpec, create_run
from launcher.backends import journal
from launcher.backends.attempt import marker
from launcher.backends.local import LocalBackend
from launcher.backends.processes import ProcessId, family, stop_family
from launcher.lifecycle import run_status
from launcher.profiles import Profile
from launcher.site import Site
from launcher.states import RunStatus

FAKE_TRAINER = Path(__file__).with_name("fake_trainer.py")
REPOSITORY = Path(__file__).resolve().parents[2]
GENEROUS_S = 60.0

SPEC: dict[str, Any] = {
    "preset": "smoke",
    "overlays": ["tiny-cpu"],
    "code": {"version": "0.1.0", "git_commit": None, "dirty": None, "diff_sha256": None},
    "training": {"total_steps": 2, "prompts_per_step": 1, "responses_per_prompt": 2},
    "data": {"max_response_length": 16},
    "hardware": {
        "device": "cpu", "nodes": 1, "ranks_per_node": 1, "gpu_product": None, "cpus": 1, "memory": "1Mi",
    },
    "retry": {"backoff_limit": 2, "backoff_s": 0.01, "grace_period_s": 30, "deadline_s": 600},
}  # fmt: skip


@dataclass
class LocalRun:
    """A run directory, the orders for its fake trainer, and the backend that runs it."""

    root: Path
    name: str
    spec: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(SPEC))

    @property
    def paths(self) -> RunPaths:
        return RunPaths.of(self.root, self.name)

    @property
    def run(self) -> RunSpec:
        return RunSpec.new(self.name, copy.deepcopy(self.spec), wandb={"mode": "offline", "url": None})

    @property
    def orders_file(self) -> Path:
        return self.root.parent / f"orders-{self.name}" / "orders.json"

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(FAKE_TRAINER), str(self.orders_file), str(self.paths.root_dir)]

    @property
    def backend(self) -> LocalBackend:
        return LocalBackend(self.place.profile, self.command)

    @property
    def place(self) -> Site:
        """This machine, with the real trainer's backend."""
        return Site.open(Profile(name="local", backend="local"), self.root)

    @property
    def site(self) -> Site:
        return replace(self.place, backend=self.backend)

    def orders(self, *starts: Sequence[str], **retry: float) -> LocalRun:
        """Write the orders, one list a start."""
        self.orders_file.parent.mkdir(exist_ok=True)
        self.orders_file.write_text(json.dumps(starts))
        self.spec["retry"] |= retry
        return self

    def order(self, *starts: Sequence[str], **retry: float) -> LocalRun:
        """Write the orders, and make the run directory."""
        self.orders(*starts, **retry)
        create_run(self.paths, self.run)
        return self

    def start(self) -> LocalRun:
        assert self.backend.submit(self.run)
        return self

    def status(self) -> RunStatus:
        return run_status(self.site, self.name)

    def wait_settled(self) -> RunStatus:
        wait_for(lambda: self.status().settled)
        return self.status()

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in journal.read_events(self.paths) if event["event"] == kind]

    def supervisor(self) -> ProcessId:
        record = journal.read_supervisor(self.paths)
        assert record is not None
        return record.process

    def pids(self, register: str) -> list[int]:
        """The process numbers that the fake trainer wrote down: ``starts`` or ``orphans``."""
        path = self.orders_file.with_name(register)
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def wait_for_log(self, text: str, attempt: int = 1) -> None:
        log = self.paths.log(attempt)
        wait_for(lambda: log.exists() and text in log.read_text())

    def living(self) -> list[ProcessId]:
        return family(marker(self.paths))


@pytest.fixture
def local_run(tmp_path: Path) -> Iterator[LocalRun]:
    run = LocalRun(tmp_path / "runs", "infl-fake-0221")
    yield run
    stop_everything(run)


def stop_everything(run: LocalRun) -> None:
    """Whatever a failed test left behind."""
    with suppress(RunDirError):
        record = journal.read_supervisor(run.paths)
        if record is not None:
            record.process.send(signal.SIGKILL)
    stop_family(run.living, settle_s=0)
    for pid in run.pids("orphans"):
        process = ProcessId.of(pid)
        if process is not None and "time.sleep(1000)" in Path(f"/proc/{pid}/cmdline").read_text():
            process.send(signal.SIGKILL)


def wait_for(done: Callable[[], Any], timeout_s: float = GENEROUS_S) -> None:
    """Poll until true; the time-out is there to end a broken test, not to measure."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def launcher(*args: str, root: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "launcher", *args],
        env={**os.environ, "INFL_ROOT": str(root), "PYTHONPATH": python_path()},
        capture_output=True, text=True, check=False, timeout=GENEROUS_S, **options,
    )  # fmt: skip


def submit_process(run: LocalRun, *options: str, **popen: Any) -> subprocess.Popen[str]:
    """The command ``submit`` in a process of its own, with the fake trainer for the real one."""
    driver = Path(__file__).with_name("submit_fake.py")
    return subprocess.Popen(
        [sys.executable, str(driver), str(run.root), run.name, json.dumps(run.spec), *options],
        env={**os.environ, "PYTHONPATH": python_path()},
        text=True, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen},
    )  # fmt: skip


def supervise(run_dir: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a supervisor in the foreground."""
    return subprocess.run(
        [sys.executable, "-m", "launcher.backends.supervisor", "--run-dir", str(run_dir), *command],
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True, text=True, check=False, timeout=GENEROUS_S,
    )  # fmt: skip


def python_path() -> str:
    return os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
