from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influence.rundir import (
    Attempt,
    CorruptError,
    NotARunError,
    RunPaths,
    RunSpec,
    SchemaVersionError,
    Segment,
    StepWriter,
    claim_attempt,
    committed_steps,
    create_run,
    encode,
    missing_steps,
    verify_step,
)
from influence.rundir.lineage import Lineage

from .steps import STORE, commit, new_run, step_arrays, writer

# Brute force: weights remember every (attempt, step) that made them. What readers must see is then simply
# what the weights after the last step remember; no segments, no records.
History = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """What one attempt does."""

    resume: int
    """Which of the checkpoints there are (modulo their number); 0: none."""
    num_steps: int
    saves: tuple[bool, ...]
    """Whether a checkpoint follows the commit of each of its steps."""
    deterministic: bool
    """Whether it computes what every other deterministic attempt computes."""


@dataclass
class World:
    """A run on disk beside the plain story of what happened."""

    paths: RunPaths
    checkpoints: dict[int, tuple[int, History]] = field(default_factory=dict)
    """Step -> (attempt that wrote the checkpoint, the weights in it)."""
    commits: dict[tuple[int, int], History] = field(default_factory=dict)
    seeds: dict[tuple[int, int], int] = field(default_factory=dict)

    def play(self, plan: Plan, *, with_marker: bool) -> None:
        attempt = claim_attempt(self.paths)
        weights: History = ()
        step = 0
        if plan.resume and self.checkpoints:
            step = sorted(self.checkpoints)[(plan.resume - 1) % len(self.checkpoints)]
            wrote, weights = self.checkpoints[step]
            attempt.set_resume(step, from_attempt=wrote if with_marker else None)
        step_writer = writer(self.paths, attempt)
        for saves in plan.saves[: plan.num_steps]:
            step += 1
            weights += ((attempt.number, step),)
            self.seeds[weights[-1]] = step if plan.deterministic else 1000 * attempt.number + step
            step_writer.commit(step, step_arrays(self.seeds[weights[-1]]), timings={}, metrics={})
            self.commits[weights[-1]] = weights
            if saves:
                self.checkpoints[step] = (attempt.number, weights)

    def final(self) -> dict[int, int]:
        """Step -> attempt, for the weights after the last step."""
        if not self.commits:
            return {}
        last = max(self.commits, key=lambda made: (made[1], made[0]))
        return {step: attempt for attempt, step in self.commits[last]}

    def first(self) -> dict[int, int]:
        return {step: min(a for a, s in self.commits if s == step) for step in {s for _, s in self.commits}}


def attempts_by_step(paths: RunPaths, lineage: Lineage) -> dict[int, int]:
    return {step: record.attempt for step, record in committed_steps(paths, lineage).items()}


def assert_readers_see(world: World) -> None:
    for lineage, expected in (("final", world.final()), ("first", world.first())):
        assert attempts_by_step(world.paths, lineage) == expected
        seen = committed_steps(world.paths, lineage)
        assert list(seen) == sorted(seen)
        for step, record in seen.items():
            assert verify_step(world.paths, record).status == "ok"
            made = (record.attempt, step)
            assert record.npz(world.paths).read_bytes() == encode(step_arrays(world.seeds[made]))
    total = max(world.final(), default=0) + 2
    assert missing_steps(world.paths, total) == [s for s in range(1, total + 1) if s not in world.final()]


def plans(*, always_saves: bool) -> st.SearchStrategy[list[Plan]]:
    saves = st.just(True) if always_saves else st.booleans()
    return st.lists(
        st.builds(
            Plan,
            resume=st.integers(0, 4),
            num_steps=st.integers(0, 4),
            saves=st.tuples(saves, saves, saves, saves),
            deterministic=st.booleans(),
        ),
        max_size=5,
    )


@pytest.mark.usefixtures("no_waiting_for_the_disk")
@pytest.mark.parametrize("with_marker", [True, False], ids=["marker", "no marker"])
def test_readers_see_what_the_weights_remember(with_marker: bool) -> None:
    """Without a marker a checkpoint's writer is inferred: right if each commit gets its checkpoint."""

    @given(plans(always_saves=not with_marker))
    @settings(max_examples=40, deadline=None)
    def check(schedule: list[Plan]) -> None:
        root = Path(tempfile.mkdtemp(prefix="lineage-"))
        try:
            world = World(new_run(root))
            for plan in schedule:
                world.play(plan, with_marker=with_marker)
                assert_readers_see(world)
        finally:
            shutil.rmtree(root)

    check()


def test_the_story_that_the_rules_are_made_for(paths: RunPaths) -> None:
    """Killed after step 3 with the checkpoint of step 2; the retry computes step 3 anew and goes on."""
    one = claim_attempt(paths)
    for step in (1, 2, 3):
        commit(paths, one, step, seed=step)
    two = claim_attempt(paths)
    two.set_resume(2)
    assert two.record.segments == (Segment(1, 1, 2), Segment(2, 3, None))
    commit(paths, two, 3, seed=30)
    assert attempts_by_step(paths, "final") == {1: 1, 2: 1, 3: 2}
    commit(paths, two, 4, seed=40)
    assert attempts_by_step(paths, "final") == {1: 1, 2: 1, 3: 2, 4: 2}
    assert attempts_by_step(paths, "first") == {
        1: 1,
        2: 1,
        3: 1,
        4: 2,
    }
    assert missing_steps(paths, 5) == [5] and missing_steps(paths, 4) == []


def test_the_marker_decides_where_two_attempts_committed_the_step(paths: RunPaths) -> None:
    commit(paths, claim_attempt(paths), 1, seed=1)
    commit(paths, claim_attempt(paths), 1, seed=2)  # from scratch, and killed before its own checkpoint
    three = claim_attempt(paths)
    three.set_resume(1, from_attempt=1)
    assert three.record.segments == (Segment(1, 1, 1), Segment(3, 2, None))
    three.set_resume(1)
    assert three.record.segments == (Segment(2, 1, 1), Segment(3, 2, None))
    three.set_resume(0)
    assert three.record.segments == (Segment(3, 1, None),)


@pytest.mark.parametrize(("step", "from_attempt"), [(2, None), (1, 2), (2, 1), (1, 3), (1, 99), (1, 0)])
def test_a_checkpoint_of_a_step_that_nobody_committed(
    paths: RunPaths, step: int, from_attempt: int | None
) -> None:
    commit(paths, claim_attempt(paths), 1)
    claim_attempt(paths)
    three = claim_attempt(paths)
    before = three.record
    with pytest.raises(CorruptError, match=f"checkpoint of step {step}"):
        three.set_resume(step, from_attempt)
    assert three.record == before


def test_a_run_without_commits(paths: RunPaths) -> None:
    assert committed_steps(paths) == committed_steps(paths, "first") == {}
    assert missing_steps(paths, 2) == [1, 2] and missing_steps(paths, 0) == []
    with pytest.raises(ValueError, match="'last', not 'final' or 'first'"):
        committed_steps(paths, "last")


def test_no_run_at_all(tmp_path: Path) -> None:
    with pytest.raises(NotARunError):
        committed_steps(RunPaths.of(tmp_path, "infl-none"))


def test_what_is_wrong_with_a_file_is_named(paths: RunPaths, tmp_path: Path) -> None:
    attempt = claim_attempt(paths)
    record = commit(paths, attempt, 1)
    npz = paths.step_npz(1)
    data = npz.read_bytes()

    def status() -> str:
        check = verify_step(paths, record)
        assert check.path == npz and bool(check.reason) == (check.status != "ok")
        return check.status

    assert status() == "ok"
    npz.write_bytes(data[:-1])
    assert status() == "torn"
    npz.write_bytes(data + b"\0")
    assert status() == "torn"
    npz.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert status() == "corrupt"
    npz.unlink()
    assert status() == "missing"
    (tmp_path / "elsewhere.npz").write_bytes(data)
    npz.symlink_to(tmp_path / "elsewhere.npz")
    assert status() == "foreign"
    npz.unlink()
    npz.mkdir()
    assert status() == "foreign"


def test_a_linked_directory_is_never_followed(paths: RunPaths, tmp_path: Path) -> None:
    record = commit(paths, claim_attempt(paths), 1)
    paths.steps_dir.rename(tmp_path / "elsewhere")
    paths.steps_dir.symlink_to(tmp_path / "elsewhere")
    assert verify_step(paths, record).status == "foreign"
    with pytest.raises(CorruptError, match="symbolic link"):
        committed_steps(paths)
    with pytest.raises(CorruptError, match="symbolic link"):
        commit(paths, claim_attempt(paths), 2)
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == [
        "step_000001.json",
        "step_000001.npz",
    ]


def test_another_runs_step_is_foreign(paths: RunPaths, tmp_path: Path) -> None:
    other = RunPaths.of(tmp_path / "other", "infl-other")
    other_spec = RunSpec.new("infl-other", {"preset": "other"})
    create_run(other, other_spec)
    attempt = claim_attempt(other)
    record = StepWriter(other, attempt.number, other_spec.spec_hash, store=STORE).commit(
        1, step_arrays(), timings={}, metrics={}
    )
    for path in other.steps_dir.iterdir():
        shutil.copy(path, paths.steps_dir)
    check = verify_step(paths, record)
    assert check.status == "foreign" and other_spec.spec_hash in check.reason
    with pytest.raises(CorruptError, match="belongs to another run") as error:
        committed_steps(paths)
    assert error.value.path == paths.step_record(1)
    damaged: list[CorruptError] = []
    assert committed_steps(paths, damaged=damaged) == {} and len(damaged) == 1


def test_one_damaged_record_does_not_hide_the_others(paths: RunPaths) -> None:
    attempt = claim_attempt(paths)
    for step in (1, 2, 3):
        commit(paths, attempt, step)
    paths.step_record(2).write_text('{"step": 2')
    damaged: list[CorruptError] = []
    assert list(committed_steps(paths, damaged=damaged)) == [1, 3]
    assert [error.path for error in damaged] == [paths.step_record(2)]
    with pytest.raises(CorruptError):
        missing_steps(paths, 3)


def test_a_commit_from_outside_of_the_lineage_never_fills_a_gap(paths: RunPaths) -> None:
    one = claim_attempt(paths)
    for step in (1, 2):
        commit(paths, one, step)
    two = claim_attempt(paths)
    two.set_resume(1)
    for step in (2, 3):
        commit(paths, two, step)
    assert attempts_by_step(paths, "final") == {1: 1, 2: 2, 3: 2}
    paths.replay_record(2, 2).unlink()
    assert attempts_by_step(paths, "final") == {1: 1, 3: 2}
    assert missing_steps(paths, 3) == [2]


def test_a_record_of_another_schema_version_is_an_error_in_any_case(paths: RunPaths) -> None:
    commit(paths, claim_attempt(paths), 1)
    document = json.loads(paths.step_record(1).read_text())
    paths.step_record(1).write_text(json.dumps({**document, "schema_version": 2}))
    with pytest.raises(SchemaVersionError) as error:
        committed_steps(paths, damaged=[])
    assert error.value.path == paths.step_record(1)


def test_reading_depends_on_no_attempt_record(paths: RunPaths) -> None:
    commit(paths, claim_attempt(paths), 1)
    two = claim_attempt(paths)
    Attempt(paths, two.number).set_resume(1)
    commit(paths, two, 2)
    before = committed_steps(paths)
    shutil.rmtree(paths.attempts_dir)
    assert committed_steps(paths) == before and list(before) == [1, 2]
