"""A run on two nodes of a real Ray cluster: stopped, robbed of a node, finished; and equal to a run on one.

Attempt 1 gets SIGTERM after step 1; attempt 2 loses a node; attempt 3 waits for one, resumes and finishes.
The same run on one node with two ranks goes on meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray")

from influence.rundir import (
    RunPaths,
    committed_steps,
    create_run,
    list_attempts,
    load_step,
    missing_steps,
    verify_step,
)
from influence.tiny.cache import cache_root
from tests.trainer.conftest import resolve, run_document
from tests.trainer.two_raylets import TwoRaylets, processes_marked, wait_until

pytestmark = pytest.mark.slow

TIMEOUT_S = 600
LEAVE_S = 30  # Ray ends a job's actors a moment after its driver
TWO_NODES = {"hardware__nodes": 2, "hardware__ranks_per_node": 1, "hardware__cpus": 1}


def start_trainer(paths: RunPaths, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "influence.train", "--run-dir", str(paths.root_dir)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )


def new_run(root: Path, name: str, **changes: Any) -> RunPaths:
    paths = RunPaths.of(root, name)
    create_run(paths, run_document(name, resolve("alltoken-timing", "tiny-cpu", **changes)))
    return paths


@dataclass
class History:
    """What was seen while the run went on."""

    paths: RunPaths
    cluster: TwoRaylets
    exit_codes: list[int] = field(default_factory=list)
    loss_noticed_s: float = 0.0

    def start(self) -> subprocess.Popen[bytes]:
        return start_trainer(self.paths, {"RAY_ADDRESS": self.cluster.address, **self.cluster.authentication})

    def until(self, trainer: subprocess.Popen[bytes], condition: Callable[[], bool], what: str) -> None:
        def ready() -> bool:
            assert trainer.poll() is None, self.log()[-4000:]
            return condition()

        wait_until(ready, what, TIMEOUT_S)

    def end(self, trainer: subprocess.Popen[bytes]) -> None:
        self.exit_codes.append(trainer.wait(timeout=TIMEOUT_S))
        mark = f"INFL_RUN_DIR={self.paths.root_dir.resolve()}"
        wait_until(lambda: not processes_marked(mark), "the job's actors to end on both nodes", LEAVE_S)

    def log(self) -> str:
        path = self.paths.log(len(self.exit_codes) + 1)
        return path.read_text() if path.exists() else ""

    def actors_on_worker(self) -> int:
        """Processes of the run on the second node."""
        run = set(processes_marked(f"INFL_RUN_DIR={self.paths.root_dir.resolve()}"))
        return len(run & set(self.cluster.processes_of("worker")))


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunPaths, subprocess.Popen[bytes]]]:
    paths = new_run(tmp_path_factory.mktemp("one"), "infl-one-node-0001")
    trainer = start_trainer(paths, {})
    yield paths, trainer
    trainer.terminate()
    trainer.wait()


@pytest.fixture(scope="module")
def history(
    tmp_path_factory: pytest.TempPathFactory, one_node: tuple[RunPaths, subprocess.Popen[bytes]]
) -> Iterator[History]:
    root = tmp_path_factory.mktemp("two")
    paths = new_run(root, "infl-two-nodes-0001", **TWO_NODES)
    for kind in ("tiny", "arithmetic"):  # made once for both runs, where the machine has them
        if (cache_root() / kind).is_dir():
            shutil.copytree(cache_root() / kind, paths.inputs_dir / kind)
    history = History(paths, TwoRaylets(root))
    trainer = None
    try:
        history.cluster.start()
        trainer = history.start()
        tracker = paths.checkpoints_dir / "latest_checkpointed_iteration.txt"
        history.until(trainer, lambda: tracker.exists() and tracker.read_text() == "1", "checkpoint 1")
        assert not paths.step_record(2).exists()
        trainer.send_signal(signal.SIGTERM)
        history.end(trainer)

        trainer = history.start()
        history.until(trainer, lambda: history.actors_on_worker() > 0, "an actor on the second node")
        history.cluster.kill_worker()
        lost_at = time.monotonic()
        history.end(trainer)
        history.loss_noticed_s = time.monotonic() - lost_at

        trainer = history.start()
        history.until(trainer, lambda: "waiting for the Ray cluster's nodes" in history.log(), "the wait")
        history.cluster.start_worker()
        history.end(trainer)
        yield history
    finally:
        if trainer is not None:
            trainer.kill()
            trainer.wait()
        history.cluster.stop()


def test_each_attempt_ends_with_the_code_that_a_supervisor_acts_on(history: History) -> None:
    assert history.exit_codes == [75, 1, 0], history.paths.log(len(history.exit_codes)).read_text()[-4000:]
    first, _, third = list_attempts(history.paths)
    assert (first.reason, third.reason) == ("stopped by SIGTERM", "all steps committed (0)")
    assert third.resumed_from == 1


def test_a_lost_node_is_named_as_the_reason(history: History) -> None:
    reason = list_attempts(history.paths)[1].reason or ""
    assert reason.startswith("Ray node "), reason
    assert " died: " in reason


def test_all_steps_are_committed_and_verify(history: History) -> None:
    assert missing_steps(history.paths, 2) == []
    for record in committed_steps(history.paths).values():
        assert verify_step(history.paths, record).status == "ok"


def test_the_scores_are_those_of_one_node_bit_by_bit(
    history: History, one_node: tuple[RunPaths, subprocess.Popen[bytes]]
) -> None:
    """Same ranks, same rows, same order of addition: where the ranks run makes no difference."""
    paths, trainer = one_node
    assert trainer.wait(timeout=TIMEOUT_S) == 0
    for step in (1, 2):
        here, there = (load_step(p.root_dir, step).arrays for p in (history.paths, paths))
        assert np.any(here.scores != 0)
        assert here.uid == there.uid
        np.testing.assert_array_equal(here.scores, there.scores)
    npz = {p.name: hashlib.sha256(p.step_npz(1).read_bytes()).hexdigest() for p in (paths, history.paths)}
    assert len(set(npz.values())) == 1


def test_what_other_nodes_read_lies_in_the_run_directory(history: History) -> None:
    text = history.paths.log(3).read_text()
    assert f"{history.paths.inputs_dir}/tiny/" in text
    assert json.loads(history.paths.run_json.read_text())["spec"]["hardware"]["nodes"] == 2


def test_ray_itself_is_left_running(history: History) -> None:
    assert history.cluster.processes_of("head")
    assert history.cluster.processes_of("worker")
