"""What a node of several says about itself before verl is started; no Ray here."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from influence.machine import Machine
from influence.rundir import Attempt, RunPaths, TrainerExit, claim_attempt
from influence.train import node as node_module
from influence.train.node import NodeProblem, node_problem
from influence.train.version import installed_version
from tests.trainer.conftest import Spec

LARGE = Machine(num_cpus=128, memory_bytes=2**41, shared_memory_bytes=2**39, num_gpus=0)


@pytest.fixture
def paths(make_run: Callable[..., RunPaths], tiny_spec: Spec) -> RunPaths:
    paths = make_run(tiny_spec)
    claim_attempt(paths, package_version=installed_version())
    return paths


@pytest.fixture(autouse=True)
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "this_machine", lambda: LARGE)


def ask(
    paths: RunPaths, spec: Spec, version: str | None = None, seen_from: Path | None = None
) -> NodeProblem | None:
    """A node where the run directory is what ``seen_from`` holds."""
    run_dir = seen_from or paths.root_dir
    return node_problem(spec, str(run_dir), Attempt(paths, 1).record, version or installed_version())


def test_a_node_like_the_drivers_has_no_problem(paths: RunPaths, tiny_spec: Spec) -> None:
    assert ask(paths, tiny_spec) is None


def test_storage_that_only_the_driver_has(paths: RunPaths, tiny_spec: Spec, tmp_path: Path) -> None:
    elsewhere = RunPaths.of(tmp_path / "elsewhere", paths.name)
    problem = ask(paths, tiny_spec, seen_from=elsewhere.root_dir)
    assert problem is not None
    assert problem.code == TrainerExit.CONFIG
    assert "mount the same storage at the same path on every node" in problem.reason
    assert str(elsewhere.root_dir) in problem.reason


def test_another_run_directory_of_the_same_name(paths: RunPaths, tiny_spec: Spec, tmp_path: Path) -> None:
    """A node's own disk, where an earlier try of the same run left an attempt 1."""
    elsewhere = RunPaths.of(tmp_path / "elsewhere", paths.name)
    elsewhere.attempts_dir.mkdir(parents=True)
    record = Attempt(paths, 1).record
    elsewhere.attempt(1).write_text(json.dumps(replace(record, pid=record.pid + 1).to_dict()))
    problem = ask(paths, tiny_spec, seen_from=elsewhere.root_dir)
    assert problem is not None
    assert "its record of attempt 1 is another" in problem.reason


def test_a_run_directory_that_cannot_be_written(
    paths: RunPaths, tiny_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module.os, "access", lambda path, mode: False)  # root may write anywhere
    problem = ask(paths, tiny_spec)
    assert problem is not None
    assert "cannot be written there" in problem.reason


def test_another_version_of_the_package(paths: RunPaths, tiny_spec: Spec) -> None:
    problem = ask(paths, tiny_spec, version="9.9")
    assert problem is not None
    assert (problem.code, "the driver has 9.9" in problem.reason) == (TrainerExit.CONFIG, True)


def test_a_node_with_too_little_memory_or_without_the_data(
    paths: RunPaths, tiny_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "this_machine", lambda: replace(LARGE, memory_bytes=2**30))
    problem = ask(paths, tiny_spec)
    assert problem is not None
    assert "hardware.memory is 6Gi" in problem.reason
    tiny_spec["data"] |= {"source": "parquet", "train_files": ["/no/train.parquet"], "val_files": []}
    problem = ask(paths, tiny_spec)
    assert problem is not None
    assert problem.code == TrainerExit.DATA
