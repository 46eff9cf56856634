"""A SIGKILL before each single operation on files: whatever remains, no step is half committed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from influence.rundir import (
    RunPaths,
    RunSpec,
    claim_attempt,
    committed_steps,
    create_run,
    encode,
    list_attempts,
    load_step,
    missing_steps,
    read_run,
    verify_step,
)

from .operations import killed_before
from .steps import RUN, SPEC, commit, new_run, step_arrays, temporaries, tree

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.usefixtures("no_waiting_for_the_disk"),
]


def every_crash(tmp_path: Path, prepare: Callable[[RunPaths], Callable[[], object]]):
    """A fresh run for each operation of the work that ``prepare`` returns, killed before that operation."""
    for number in range(1000):
        paths = RunPaths.of(tmp_path / str(number), RUN)
        work = prepare(paths)
        if not killed_before(number, work):
            assert number > 3  # there was something to kill
            return
        yield paths
    raise AssertionError("the work has no end")


def state_of(paths: RunPaths) -> str:
    """Which of the stages of a commit a crash left behind."""
    names = sorted(path.name for path in paths.steps_dir.iterdir() if not path.name.startswith("."))
    return "+".join(name.rpartition(".")[2] for name in names) + (
        "+tmp" if temporaries(paths.steps_dir) else ""
    )


def assert_next_attempt_commits(paths: RunPaths, seed: int) -> None:
    """The retry after a crash: it cleans up, and step 1 is committed once, with somebody's whole data."""
    before = committed_steps(paths)
    for record in before.values():
        assert verify_step(paths, record).status == "ok"
    assert missing_steps(paths, 1) == ([] if before else [1])
    retry = claim_attempt(paths)
    assert temporaries(paths.root_dir / "steps") == []
    record = commit(paths, retry, 1, seed)
    assert record.replay is bool(before)
    first = committed_steps(paths, "first")[1]
    assert first == before.get(1, record)
    assert paths.step_npz(1).read_bytes() == encode(step_arrays(1 if before else seed))
    load_step(paths, 1)
    assert tree(paths.steps_dir).keys() == {"step_000001.npz", "step_000001.json"}


@pytest.mark.parametrize("seed", [1, 2], ids=["same bytes", "other bytes"])
def test_a_crash_in_a_commit(tmp_path: Path, seed: int) -> None:
    def prepare(paths: RunPaths) -> Callable[[], object]:
        attempt = claim_attempt(new_run(paths.root_dir.parent))
        return lambda: commit(paths, attempt, 1, seed=1)

    states = set()
    for paths in every_crash(tmp_path, prepare):
        states.add(state_of(paths))
        assert_next_attempt_commits(paths, seed)
    assert states == {"", "+tmp", "npz+tmp", "npz", "json+npz+tmp", "json+npz"}


def test_a_crash_while_an_orphan_is_replaced(tmp_path: Path) -> None:
    def prepare(paths: RunPaths) -> Callable[[], object]:
        attempt = claim_attempt(new_run(paths.root_dir.parent))
        paths.step_npz(1).write_bytes(encode(step_arrays(7)))
        return lambda: commit(paths, attempt, 1, seed=1)

    states = set()
    for paths in every_crash(tmp_path, prepare):
        states.add(state_of(paths))
        assert_next_attempt_commits(paths, seed=2)
    assert states == {"npz", "npz+tmp", "+tmp", "json+npz+tmp", "json+npz"}


@pytest.mark.parametrize("seed", [1, 2], ids=["same bytes", "other bytes"])
def test_a_crash_in_a_replay(tmp_path: Path, seed: int) -> None:
    def prepare(paths: RunPaths) -> Callable[[], object]:
        commit(new_run(paths.root_dir.parent), claim_attempt(paths), 1, seed=1)
        attempt = claim_attempt(paths)
        return lambda: commit(paths, attempt, 1, seed)

    for paths in every_crash(tmp_path, prepare):
        first = committed_steps(paths, "first")[1]
        final = committed_steps(paths)[1]
        assert {verify_step(paths, record).status for record in (first, final)} == {"ok"}
        retry = claim_attempt(paths)
        assert temporaries(paths.root_dir) == []
        assert commit(paths, retry, 1, seed).attempt == committed_steps(paths)[1].attempt == 3
        assert committed_steps(paths, "first")[1] == first


def test_a_crash_in_a_claim_leaves_a_whole_record_or_none(tmp_path: Path) -> None:
    def prepare(paths: RunPaths) -> Callable[[], object]:
        new_run(paths.root_dir.parent)
        return lambda: claim_attempt(paths)

    for paths in every_crash(tmp_path, prepare):
        num_before = len(list_attempts(paths))
        assert num_before in (0, 1)
        assert claim_attempt(paths).number == num_before + 1


def test_a_crash_while_the_end_is_written_leaves_the_attempt_open_or_ended(tmp_path: Path) -> None:
    def prepare(paths: RunPaths) -> Callable[[], object]:
        attempt = claim_attempt(new_run(paths.root_dir.parent))
        return lambda: attempt.finish(1, "failed (exit code 1)")

    seen = set()
    for paths in every_crash(tmp_path, prepare):
        (record,) = list_attempts(paths)
        assert record.is_open == (record.exit_code is None) == (record.reason is None)
        seen.add(record.is_open)
    assert seen == {True, False}


def test_a_crash_in_create_run_is_created_or_adopted_by_the_next(tmp_path: Path) -> None:
    def prepare(paths: RunPaths) -> Callable[[], object]:
        return lambda: create_run(paths, RunSpec.new(RUN, SPEC))

    seen = set()
    for paths in every_crash(tmp_path, prepare):
        there = os.path.lexists(paths.run_json)
        assert create_run(paths, RunSpec.new(RUN, SPEC)) is not there
        assert read_run(paths).spec == SPEC
        commit(paths, claim_attempt(paths), 1)
        seen.add(there)
    assert seen == {True, False}
