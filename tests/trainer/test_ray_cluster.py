"""Which Ray cluster a run on several nodes joins, and what it must have free."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

from influence.rundir import RunPaths, TrainerExit, create_run, list_attempts
from influence.train import ray_cluster
from influence.train.ray_cluster import Node, lacking, ray_address
from influence.train.refusal import FAILED, Refusal
from influence.verl_engine.overrides import num_logical_cpus
from tests.own_time import give_own_time
from tests.trainer.conftest import resolve, run_document
from tests.trainer.two_raylets import free_port

pytestmark = pytest.mark.slow  # imports Ray


def node(number: int, num_accelerators: float, num_cpus: float = 96) -> Node:
    return Node(f"id{number}", f"10.0.0.{number}", num_accelerators, num_cpus)


def test_enough_nodes_must_have_their_accelerators_free() -> None:
    assert lacking([node(1, 8), node(2, 8)], 2, 8) is None
    assert lacking([node(1, 0), node(2, 8), node(3, 8)], 2, 8) is None, "a head without GPUs does no harm"
    missing = lacking([node(1, 8), node(2, 7)], 2, 8)
    assert missing == "1 of 2 nodes with 8 free GPU of Ray's (there are 10.0.0.1: 8, 10.0.0.2: 7)"
    assert "1 of 2" in (lacking([node(1, 16)], 2, 8) or ""), "two nodes' GPUs on one are not two nodes"
    assert "(there are none)" in (lacking([], 2, 8) or "")


def test_too_few_cpus_would_hang_verl() -> None:
    wanted = num_logical_cpus(16)
    assert lacking([node(1, 8, wanted / 2), node(2, 8, wanted / 2)], 2, 8) is None
    missing = lacking([node(1, 8, wanted / 2), node(2, 8, wanted / 2 - 1)], 2, 8)
    assert missing is not None
    assert f"verl's actors take {wanted}" in missing


def test_the_address_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert ray_address() == "auto"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert ray_address() == "10.0.0.1:6379"


def test_an_address_that_is_none_is_a_mistake() -> None:
    for address in ("10.0.0.1", ":6379", "10.0.0.1:ray"):
        with pytest.raises(Refusal, match="must be HOST:PORT") as caught:
            ray_cluster._require_listening(address)
        assert caught.value.code == TrainerExit.CONFIG


@pytest.mark.parametrize("address", ["local", "ray://10.0.0.1:10001"])
def test_a_cluster_is_joined_from_inside(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(Refusal, match="joins a Ray cluster from one of its nodes") as caught:
        ray_address()
    assert caught.value.code == TrainerExit.CONFIG


class FakeRay:
    """A cluster whose second node joins late, or never."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, comes_after: int, queue_goes_after: int = 0
    ) -> None:
        self.num_asked = 0
        self.said: list[str] = []
        self._comes_after, self._queue_goes_after = comes_after, queue_goes_after
        monkeypatch.setattr(ray_cluster, "_free_nodes", self._nodes)
        monkeypatch.setattr(ray_cluster, "_is_queue_taken", lambda: self.num_asked <= queue_goes_after)
        give_own_time(monkeypatch, ray_cluster, sleep=self._wait, monotonic=lambda: self._now_s)
        self._now_s = 1000.0

    def _wait(self, seconds: float) -> None:
        self._now_s += seconds

    def _nodes(self) -> list[Node]:
        self.num_asked += 1
        return [node(1, 8), node(2, 8)][: 2 if self.num_asked > self._comes_after else 1]

    def wait(self, wait_s: float) -> list[Node]:
        return ray_cluster._wait_for_nodes({"nodes": 2, "ranks_per_node": 8}, self.said.append, wait_s)


def test_nodes_that_come_late_are_waited_for_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, comes_after=40)
    assert len(fake.wait(600)) == 2
    assert 1 <= len(fake.said) <= 4
    assert "1 of 2 nodes" in fake.said[0]


def test_nodes_that_never_come_are_worth_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, comes_after=10**6)
    with pytest.raises(
        Refusal, match="waited 60 s for the Ray cluster's nodes in vain: there is 1 of 2"
    ) as caught:
        fake.wait(60)
    assert caught.value.code == FAILED


def test_the_queue_of_an_earlier_attempt_must_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRay(monkeypatch, comes_after=0, queue_goes_after=3)
    assert len(fake.wait(600)) == 2
    assert fake.num_asked == 4
    assert "an earlier attempt that is still ending" in fake.said[0]


def run_once(tmp_path: Path, address: str) -> tuple[int, str]:
    paths = RunPaths.of(tmp_path, "infl-no-cluster-0001")
    spec = resolve("alltoken-timing", "tiny-cpu", hardware__nodes=2, hardware__ranks_per_node=1)
    create_run(paths, run_document(paths.name, spec))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-m", "influence.train", "--run-dir", str(paths.root_dir)],
        env={**clean, "RAY_ADDRESS": address},
        capture_output=True,
        check=False,
        timeout=180,
    )
    (attempt,) = list_attempts(paths)
    assert attempt.exit_code == done.returncode
    return done.returncode, attempt.reason or ""


def test_the_trainer_refuses_what_it_cannot_join(tmp_path: Path) -> None:
    code, reason = run_once(tmp_path, "local")
    assert code == TrainerExit.CONFIG, reason
    assert "RAY_ADDRESS is local, and a run on several nodes joins a Ray cluster" in reason


def test_without_a_cluster_a_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Ray looks through all processes of the machine, which may be running a cluster for something else.
    monkeypatch.setattr("ray._private.services._find_address_from_flag", lambda flag: set())
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(Refusal, match="nodes is 2 and there is no Ray cluster here to join") as caught:
        ray_cluster._connect(ray_address(), 2)
    assert caught.value.code == TrainerExit.CONFIG


def test_a_cluster_that_does_not_answer_is_worth_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "_HEAD_WAIT_S", 0)
    with pytest.raises(Refusal, match="cannot be joined: nothing answers there") as caught:
        ray_cluster._require_listening(f"127.0.0.1:{free_port()}")
    assert caught.value.code == FAILED
