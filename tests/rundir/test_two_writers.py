"""An attempt that hangs in the middle of a commit, and one that starts meanwhile and commits the same step.

The fence stops the first at its next look. But a look is not a lock, so all must be well too when the first
one had looked just before it hung: these tests switch its fence off and let it hang before each operation.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from influence.rundir import (
    Attempt,
    CommitRecord,
    FencedError,
    RunPaths,
    claim_attempt,
    committed_steps,
    encode,
    verify_step,
)

from .operations import Turns
from .steps import commit, new_run, step_arrays, temporaries

ORPHANS = {"no orphan": None, "an orphan": 7, "an orphan of its own": 1, "an orphan of the other's": 2}
NEVER = 10**9
pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def hang(tmp_path: Path, i: int, j: int, orphan: int | None) -> tuple[RunPaths, Turns]:
    """Attempt 1 hangs before its i-th operation, 2 starts and hangs before its j-th, 1 ends, 2 ends."""
    paths = new_run(tmp_path / f"{i}-{j}")
    if orphan is not None:
        paths.step_npz(1).write_bytes(encode(step_arrays(orphan)))
    old = claim_attempt(paths)
    turns = Turns(
        lambda: commit(paths, old, 1, 1),
        lambda: claim_attempt(paths),
        lambda: commit(paths, Attempt(paths, 2), 1, 2),
        i,
        j,
    )
    turns.run()
    return paths, turns


def assert_all_is_well(paths: RunPaths, turns: Turns) -> None:
    """Each commit that was reported is there with its own bytes, and exactly one of them is the first."""
    firsts = []
    for name, seed in (("first", 1), ("second", 2)):
        outcome = turns.results[name]
        if isinstance(outcome, FencedError) and name == "first":
            continue
        assert isinstance(outcome, CommitRecord), outcome
        assert verify_step(paths, outcome).status == "ok", (name, outcome)
        assert outcome.npz(paths).read_bytes() == encode(step_arrays(seed))
        firsts += [] if outcome.replay else [outcome]
    first = committed_steps(paths, "first")[1]
    assert firsts in ([first], [])
    assert verify_step(paths, first).status == "ok"
    assert committed_steps(paths)[1].attempt == 2
    assert temporaries(paths.root_dir / "steps") == []


def num_operations_of_the_first(tmp_path: Path, orphan: int | None) -> int:
    _, turns = hang(tmp_path / "alone", NEVER, NEVER, orphan)
    return turns.num_operations["first"]


@pytest.mark.parametrize("orphan", ORPHANS.values(), ids=ORPHANS)
def test_a_fenced_attempt_commits_before_the_claim_or_not_at_all(tmp_path: Path, orphan: int | None) -> None:
    outcomes = set()
    for i in range(num_operations_of_the_first(tmp_path, orphan) + 1):
        paths, turns = hang(tmp_path, i, NEVER, orphan)
        assert_all_is_well(paths, turns)
        outcomes.add(type(turns.results["first"]))
    assert outcomes == {CommitRecord, FencedError}


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempt 1 has always just looked for a later one, and seen none."""
    real = Attempt.require_unfenced
    monkeypatch.setattr(Attempt, "require_unfenced", lambda self: None if self.number == 1 else real(self))


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("orphan", ORPHANS.values(), ids=ORPHANS)
def test_an_attempt_that_wakes_up_after_the_fence_destroys_nothing(
    tmp_path: Path, orphan: int | None
) -> None:
    for i in range(num_operations_of_the_first(tmp_path, orphan) + 1):
        paths, turns = hang(tmp_path, i, NEVER, orphan)
        # Its own temporary file may be gone: then it could not go on, and says why.
        if "no such file" in str(turns.results["first"]).lower():
            turns.results["first"] = FencedError(paths.attempt(2), 1, 2)
        assert_all_is_well(paths, turns)


@pytest.mark.slow
@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("orphan", ORPHANS.values(), ids=ORPHANS)
def test_two_attempts_that_wake_up_by_turns_destroy_nothing(tmp_path: Path, orphan: int | None) -> None:
    for i in range(num_operations_of_the_first(tmp_path, orphan)):
        for j in itertools.count():
            paths, turns = hang(tmp_path, i, j, orphan)
            if "no such file" in str(turns.results["first"]).lower():
                turns.results["first"] = FencedError(paths.attempt(2), 1, 2)
            assert_all_is_well(paths, turns)
            if turns.num_operations["second"] <= j:
                break
