"""Collect keeps its word: what is good arrives and stays, what is not is named, whatever was there before."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from influence.rundir import CorruptError, RunPaths, load_step
from influence.rundir.errors import StorageError
from influence.rundir.files import write_json
from launcher.collect import Outcome, collect
from launcher.errors import ConflictError
from launcher.ledger import Progress
from launcher.manifest import MANIFEST_NAME, Finding, Problem, read_manifest
from tests.launcher.synthetic_run import RUN, SyntheticRun, step_arrays, tree

NPZ_2 = "steps/step_000002.npz"
RECORD_2 = "steps/step_000002.json"


@pytest.fixture
def run(tmp_path: Path) -> SyntheticRun:
    return SyntheticRun.make(tmp_path / "runs").complete()


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


def problems(outcome: Outcome) -> set[tuple[str, str]]:
    """What hurts: problem and file."""
    return {(f.problem.value, f.file) for f in outcome.manifest.findings if not f.harmless}


def harmless(outcome: Outcome) -> list[Finding]:
    return [finding for finding in outcome.manifest.findings if finding.harmless]


def flip(path: Path, at: int = -40) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


# What a collect leaves


def test_a_complete_run_is_copied_and_every_file_is_in_the_manifest_as_it_is(
    run: SyntheticRun, results: Path
) -> None:
    outcome = collect(run.paths, results)
    assert outcome.manifest.state == "complete"
    copied = tree(results / RUN)
    manifest = copied.pop(MANIFEST_NAME)
    assert manifest
    source = tree(run.paths.root_dir)
    assert copied == {file: source[file] for file in copied}
    assert set(copied) == {
        "run.json", "attempts/0001.json", "logs/attempt-0001.log", "metrics/attempt-0001.jsonl",
        "steps/step_000001.json", "steps/step_000001.npz", RECORD_2, NPZ_2,
    }  # fmt: skip
    listed = {entry.file: (entry.num_bytes, entry.sha256) for entry in outcome.manifest.files}
    assert listed == {file: (len(data), hashlib.sha256(data).hexdigest()) for file, data in copied.items()}


def test_the_copy_is_a_run_directory_that_load_step_reads(run: SyntheticRun, results: Path) -> None:
    collect(run.paths, results)
    copied, source = load_step(results / RUN, 2), load_step(run.paths, 2)
    assert np.array_equal(copied.padded(), source.padded(), equal_nan=True)


def test_the_facts_in_the_manifest_are_those_of_the_arrays(tmp_path: Path, results: Path) -> None:
    run = SyntheticRun.make(tmp_path / "runs", training={"total_steps": 1})
    lengths = [5, 3, 7, 1, 2, 2, 2, 2, 4, 4, 4, 4]
    arrays = step_arrays(run.spec, seed=3, lengths=lengths)
    scores = arrays.scores.copy()
    scores[[2, 17]] = np.nan
    scores[30] = np.inf
    run.commit(run.attempt(), 1, replace(arrays, scores=scores))
    facts = collect(run.paths, results).manifest.scores["steps/step_000001.npz"]
    assert (facts.num_rows, facts.num_groups) == (12, 3)
    assert (facts.num_positions, facts.num_expected_positions) == (40, 40)
    assert (facts.num_nan, facts.num_infinite) == (2, 1)
    kept = [
        float(value)
        for value, scored in zip(scores, np.repeat(arrays.scored, lengths), strict=True)
        if scored and np.isfinite(value)
    ]
    assert facts.quantiles == {
        "min": min(kept), "median": float(np.median(np.array(kept, dtype=np.float32))), "max": max(kept)
    }  # fmt: skip
    assert facts.num_nonzero == len(kept)
    assert facts.num_accepted_rows == int(arrays.accepted.sum())


def test_capped_tokens_are_expected_up_to_the_cap(tmp_path: Path, results: Path) -> None:
    run = SyntheticRun.make(
        tmp_path / "runs", training={"total_steps": 1}, influence={"max_tokens_per_response": 3}
    )
    run.commit(run.attempt(), 1, step_arrays(run.spec, lengths=[1, 2, 3, 4, 5, 6, 1, 1, 1, 1, 1, 1]))
    facts = collect(run.paths, results).manifest.scores["steps/step_000001.npz"]
    assert facts.num_positions == facts.num_expected_positions == 1 + 2 + 3 + 3 + 3 + 3 + 6


@pytest.mark.parametrize(("response_length", "num_expected"), [(3, 60), (4, 72)])
def test_scores_of_prompts_are_expected_beside_those_of_responses(
    tmp_path: Path, results: Path, response_length: int, num_expected: int
) -> None:
    run = SyntheticRun.make(tmp_path / "runs", training={"total_steps": 1}, influence={"positions": "all"})
    arrays = step_arrays(run.spec, lengths=[5] * 12)
    positions = np.tile(np.arange(-2, 3), 12)
    lengths = np.full(12, response_length)
    run.commit(run.attempt(), 1, replace(arrays, positions=positions, response_length=lengths))
    facts = collect(run.paths, results).manifest.scores["steps/step_000001.npz"]
    assert (facts.num_positions, facts.num_expected_positions) == (60, num_expected)


# Damage at the source


def _truncate(run: SyntheticRun) -> None:
    npz = run.paths.step_npz(2)
    npz.write_bytes(npz.read_bytes()[:-100])


def _flip(run: SyntheticRun) -> None:
    flip(run.paths.step_npz(2))


def _remove(run: SyntheticRun) -> None:
    run.paths.step_npz(2).unlink()


def _other_step(run: SyntheticRun) -> None:
    shutil.copy(run.paths.step_npz(1), run.paths.step_npz(2))


def _torn_record(run: SyntheticRun) -> None:
    record = run.paths.step_record(2)
    record.write_bytes(record.read_bytes()[:50])


def _foreign_record(run: SyntheticRun) -> None:
    text = run.paths.step_record(2).read_text()
    run.paths.step_record(2).write_text(text.replace(run.run_spec.spec_hash, "sha256:" + "0" * 64))


def _no_record(run: SyntheticRun) -> None:
    run.paths.step_record(2).unlink()


def _link_npz(run: SyntheticRun) -> None:
    npz = run.paths.step_npz(2)
    npz.rename(run.paths.root_dir / "elsewhere.npz")
    npz.symlink_to(run.paths.root_dir / "elsewhere.npz")


def _stray(run: SyntheticRun) -> None:
    (run.paths.steps_dir / "scores.npz").write_bytes(b"mine")


def _beyond(run: SyntheticRun) -> None:
    shutil.copy(run.paths.step_npz(1), run.paths.step_npz(3))


def _torn_attempt(run: SyntheticRun) -> None:
    run.paths.attempt(1).write_text('{"number": 1')


def _torn_metrics(run: SyntheticRun) -> None:
    run.paths.metrics(1).write_text('{"step": 1, "da\n' + run.paths.metrics(1).read_text())


@pytest.mark.parametrize(
    ("damage", "found", "state"),
    [
        (_truncate, ("torn", NPZ_2), "damaged"),
        (_flip, ("corrupt", NPZ_2), "damaged"),
        (_remove, ("missing", NPZ_2), "incomplete"),
        (_other_step, ("torn", NPZ_2), "damaged"),
        (_torn_record, ("corrupt", RECORD_2), "damaged"),
        (_foreign_record, ("foreign", RECORD_2), "damaged"),
        (_no_record, ("missing", RECORD_2), "incomplete"),
        (_link_npz, ("foreign", NPZ_2), "damaged"),
        (_stray, ("foreign", "steps/scores.npz"), "damaged"),
        (_beyond, ("foreign", "steps/step_000003.npz"), "damaged"),
        (_torn_attempt, ("corrupt", "attempts/0001.json"), "damaged"),
        (_torn_metrics, ("corrupt", "metrics/attempt-0001.jsonl"), "damaged"),
    ],
)
def test_damage_is_named_and_what_is_good_is_copied(
    run: SyntheticRun,
    results: Path,
    damage: Callable[[SyntheticRun], None],
    found: tuple[str, str],
    state: str,
) -> None:
    damage(run)
    outcome = collect(run.paths, results)
    assert problems(outcome) == {found}
    assert outcome.manifest.state == state
    assert all(finding.reason for finding in outcome.manifest.findings)
    step_1 = run.paths.step_npz(1).read_bytes()
    assert (results / RUN / "steps" / "step_000001.npz").read_bytes() == step_1
    bad = results / RUN / found[1]
    assert not bad.exists() or found[1].startswith("metrics/")


@pytest.mark.parametrize(
    "damage", [_truncate, _flip, _remove, _torn_record, _foreign_record, _no_record, _torn_attempt, _link_npz]
)
def test_damage_after_a_collect_never_reaches_the_good_copy(
    run: SyntheticRun, results: Path, damage: Callable[[SyntheticRun], None]
) -> None:
    good = collect(run.paths, results)
    before = tree(results)
    damage(run)
    outcome = collect(run.paths, results)
    after = tree(results)
    manifest = f"{RUN}/{MANIFEST_NAME}"
    before.pop(manifest), after.pop(manifest)
    assert after == before
    assert outcome.manifest.files == good.manifest.files
    assert outcome.manifest.scores == good.manifest.scores
    assert outcome.manifest.state == "complete"


def test_damage_that_a_good_copy_makes_up_for_is_told(run: SyntheticRun, results: Path) -> None:
    collect(run.paths, results)
    _truncate(run)
    _torn_attempt(run)
    told = {(f.problem.value, f.file) for f in harmless(collect(run.paths, results))}
    assert told == {("torn", NPZ_2), ("corrupt", "attempts/0001.json")}


@pytest.mark.parametrize("damage", [_truncate, _flip, _remove, _torn_record, _no_record])
def test_a_repaired_source_makes_the_copy_complete(
    run: SyntheticRun, results: Path, damage: Callable[[SyntheticRun], None]
) -> None:
    good = tree(run.paths.root_dir)
    damage(run)
    collect(run.paths, results)
    for file, data in good.items():
        (run.paths.root_dir / file).write_bytes(data)
    assert collect(run.paths, results).manifest.state == "complete"


def test_a_pickle_with_the_right_sha256_is_refused(run: SyntheticRun, results: Path) -> None:
    npz = run.paths.step_npz(2)
    arrays = dict(np.load(npz, allow_pickle=False))
    canary = results / "pwned"
    arrays["uid"] = np.array([_Bomb(str(canary))] * 12, dtype=object)
    with npz.open("wb") as stream:
        np.savez(stream, **arrays)
    data = npz.read_bytes()
    record = run.paths.step_record(2)
    document = __import__("json").loads(record.read_text())
    write_json(record, document | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    outcome = collect(run.paths, results)
    assert problems(outcome) == {("corrupt", NPZ_2)}
    assert not (results / RUN / NPZ_2).exists()
    assert not canary.exists()


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


# Damage of the copy


@pytest.mark.parametrize("file", ["run.json", "steps/step_000001.json", NPZ_2, "logs/attempt-0001.log"])
@pytest.mark.parametrize("how", ["flipped", "removed", "torn"])
def test_a_damaged_copy_is_replaced(run: SyntheticRun, results: Path, file: str, how: str) -> None:
    collect(run.paths, results)
    before = tree(results)
    copy = results / RUN / file
    if how == "flipped":
        flip(copy, at=10)
    elif how == "torn":
        copy.write_bytes(copy.read_bytes()[:10])
    else:
        copy.unlink()
    outcome = collect(run.paths, results)
    assert [entry.file for entry in outcome.copied] == [file]
    assert tree(results) == before


def test_a_copy_damaged_together_with_its_source_is_named_and_not_vouched_for(
    run: SyntheticRun, results: Path
) -> None:
    collect(run.paths, results)
    flip(results / RUN / NPZ_2)
    _truncate(run)
    outcome = collect(run.paths, results)
    assert problems(outcome) == {("torn", NPZ_2)}
    assert NPZ_2 not in {entry.file for entry in outcome.manifest.files}
    assert NPZ_2 not in outcome.manifest.scores


def test_a_copy_lost_after_its_source_is_named(run: SyntheticRun, results: Path) -> None:
    collect(run.paths, results)
    for file in ("logs/attempt-0001.log",):
        (run.paths.root_dir / file).unlink()
        (results / RUN / file).unlink()
    assert problems(collect(run.paths, results)) == {("missing", "logs/attempt-0001.log")}


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"schema_version": 99}'])
def test_a_damaged_manifest_is_made_anew(run: SyntheticRun, results: Path, content: bytes) -> None:
    collect(run.paths, results)
    (results / RUN / MANIFEST_NAME).write_bytes(content)
    assert collect(run.paths, results).manifest.state == "complete"
    manifest = read_manifest(results / RUN)
    assert manifest is not None
    assert manifest.state == "complete"


# Repeating, interrupting, running on


@hypothesis_settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    total=st.integers(1, 4),
    committed=st.integers(0, 4),
    replay=st.booleans(),
    damages=st.lists(
        st.tuples(
            st.sampled_from(["npz", "json"]), st.integers(1, 4), st.sampled_from(["cut", "flip", "gone"])
        ),
        max_size=3,
    ),
    ended=st.booleans(),
)
def test_collecting_twice_is_collecting_once(
    tmp_path_factory: pytest.TempPathFactory,
    total: int,
    committed: int,
    replay: bool,
    damages: list[tuple[str, int, str]],
    ended: bool,
) -> None:
    home = tmp_path_factory.mktemp("home")
    run = SyntheticRun.make(home / "runs", training={"total_steps": total})
    attempt = run.attempt()
    for step in range(1, min(committed, total) + 1):
        run.commit(attempt, step)
    if replay:
        attempt = run.attempt()
        for step in range(1, total + 1):
            run.commit(attempt, step, step_arrays(run.spec, seed=step, uid=f"again-{step % 2}"))
    if ended:
        attempt.finish(0, "done")
    for kind, step, how in damages:
        path = run.paths.step_npz(step) if kind == "npz" else run.paths.step_record(step)
        if not path.exists():
            continue
        if how == "gone":
            path.unlink()
        elif how == "cut":
            path.write_bytes(path.read_bytes()[:60])
        else:
            flip(path, at=30)
    source = tree(run.paths.root_dir)
    first = collect(run.paths, home / "results")
    once = tree(home / "results")
    second = collect(run.paths, home / "results")
    assert tree(home / "results") == once
    assert second.copied == ()
    assert second.manifest == first.manifest
    assert tree(run.paths.root_dir) == source
    # The manifest vouches for nothing that is not so.
    for entry in first.manifest.files:
        data = once[f"{RUN}/{entry.file}"]
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.num_bytes, entry.sha256)
    if not damages:
        num_steps = total if replay else min(committed, total)
        assert first.manifest.state == ("complete" if num_steps == total else "incomplete")


def test_a_running_run_gives_what_it_has_and_later_the_rest(tmp_path: Path, results: Path) -> None:
    run = SyntheticRun.make(tmp_path / "runs", training={"total_steps": 3})
    outcome = collect(run.paths, results)
    assert {f.reason for f in outcome.manifest.findings} == {"not committed; no attempt has started"}
    attempt = run.attempt()
    run.commit(attempt, 1)
    outcome = collect(run.paths, results)
    assert [(f.step, f.attempt) for f in outcome.manifest.findings] == [(2, 1), (3, 1)]
    assert "attempt 1 has not ended" in outcome.manifest.findings[0].reason
    attempt.finish(-9, "killed")
    assert "killed by SIGKILL (137)" in collect(run.paths, results).manifest.findings[0].reason
    second = run.attempt(resume=1)
    run.commit(second, 2)
    run.paths.step_npz(3).write_bytes(b"half")
    outcome = collect(run.paths, results)
    assert [f.step for f in outcome.manifest.findings] == [3]
    assert "without a commit record" in outcome.manifest.findings[0].reason
    run.commit(second, 3)
    second.finish(0, "done")
    outcome = collect(run.paths, results)
    assert outcome.manifest.state == "complete"
    # The changed attempt record, the grown metrics and step 3; step 1 and 2 were not copied again.
    assert {entry.file for entry in outcome.copied} == {
        "attempts/0002.json", "metrics/attempt-0002.jsonl", "steps/step_000003.json", "steps/step_000003.npz",
    }  # fmt: skip


def test_a_log_that_shrank_keeps_its_longer_copy(run: SyntheticRun, results: Path) -> None:
    collect(run.paths, results)
    run.paths.log(1).write_text("a")
    outcome = collect(run.paths, results)
    assert (results / RUN / "logs" / "attempt-0001.log").read_text() == "attempt 1 says hello\n"
    assert [(f.problem, f.file) for f in harmless(outcome)] == [(Problem.TORN, "logs/attempt-0001.log")]


def test_the_lineage_of_the_last_step_is_copied_with_all_records(tmp_path: Path, results: Path) -> None:
    run = SyntheticRun.make(tmp_path / "runs")
    first = run.attempt()
    run.commit(first, 1)
    run.commit(first, 2)
    second = run.attempt()  # from scratch: step 1 comes out equal, step 2 differs
    run.commit(second, 1)
    run.commit(second, 2, step_arrays(run.spec, seed=2, uid="again"))
    collect(run.paths, results)
    files = set(tree(results / RUN))
    replay = "replays/attempt-0002"
    assert {f"{replay}/step_000001.json", f"{replay}/step_000002.json", f"{replay}/step_000002.npz"} <= files
    assert {"steps/step_000001.npz", RECORD_2} <= files
    assert NPZ_2 not in files
    assert load_step(results / RUN, 2).arrays.uid[0] == "again-0"
    outcome = collect(run.paths, results, all_commits=True)
    assert load_step(results / RUN, 2, "first").arrays.uid[0] == "uid-0"
    # A collect without the option leaves what one with it copied, and still vouches for it.
    assert collect(run.paths, results).manifest.files == outcome.manifest.files


def test_the_supervisors_history_comes_along(run: SyntheticRun, results: Path) -> None:
    run.paths.local_dir.mkdir()
    run.paths.events_jsonl.write_text('{"event": "attempt_started"}\n')
    (run.paths.local_dir / "supervisor.json").write_text("{}")
    collect(run.paths, results)
    assert (results / RUN / "local" / "events.jsonl").read_text() == '{"event": "attempt_started"}\n'
    assert not (results / RUN / "local" / "supervisor.json").exists()


def test_progress_adds_up_to_the_score_files_whether_copied_or_there(
    run: SyntheticRun, results: Path
) -> None:
    class Count(Progress):
        total = done = 0

        def start(self, num_files: int, num_bytes: int) -> None:
            self.total = num_bytes

        def advance(self, num_bytes: int) -> None:
            self.done += num_bytes

    size = sum(run.paths.step_npz(step).stat().st_size for step in (1, 2))
    for _ in range(2):
        count = Count()
        collect(run.paths, results, count)
        assert count.done == count.total == size


# Other runs, links, and folders that are none


def test_a_copy_of_another_run_of_this_name_is_left_alone(
    run: SyntheticRun, results: Path, tmp_path: Path
) -> None:
    collect(run.paths, results)
    before = tree(results)
    other = SyntheticRun.make(tmp_path / "other", influence={"damping": 0.2}).complete()
    with pytest.raises(ConflictError, match="another run of this name"):
        collect(other.paths, results)
    again = SyntheticRun(
        RunPaths.of(tmp_path / "again", RUN), run.spec, created_at="2026-02-22T09:00:00.000Z"
    )
    again.create()
    with pytest.raises(ConflictError) as raised:
        collect(again.complete().paths, results)
    assert "2026-02-21T09:00:00.000Z, this run at 2026-02-22T09:00:00.000Z" in str(raised.value.why)
    assert tree(results) == before


def test_a_record_that_changed_keeps_its_copy_and_is_foreign(run: SyntheticRun, results: Path) -> None:
    collect(run.paths, results)
    record = run.paths.step_record(2)
    before = record.read_bytes()
    record.write_text(before.decode().replace('"hessian_solve": 1.469', '"hessian_solve": 1.5'))
    outcome = collect(run.paths, results)
    assert problems(outcome) == {("foreign", RECORD_2)}
    assert (results / RUN / RECORD_2).read_bytes() == before


@pytest.mark.parametrize("file", ["logs/attempt-0001.log", RECORD_2, NPZ_2, "attempts/0001.json"])
@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_no_regular_file_is_neither_followed_nor_waited_for(
    run: SyntheticRun, results: Path, tmp_path: Path, file: str, kind: str
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    path = run.paths.root_dir / file
    path.unlink()
    if kind == "link":
        path.symlink_to(secret)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    outcome = collect(run.paths, results)
    assert {name for _, name in problems(outcome)} == {file}
    assert not any(b"the secret" in data for data in tree(results).values())


@pytest.mark.parametrize("folder", ["steps", "attempts", "logs", "replays"])
def test_a_linked_folder_is_not_entered(
    run: SyntheticRun, results: Path, tmp_path: Path, folder: str
) -> None:
    path = run.paths.root_dir / folder
    if path.exists():
        path.rename(tmp_path / "moved")
    else:
        (tmp_path / "moved").mkdir()
    path.symlink_to(tmp_path / "moved")
    try:
        outcome = collect(run.paths, results)
    except CorruptError as error:
        assert error.path == path
    else:
        assert outcome.manifest.state == "damaged"
    assert not (results / RUN / folder / "step_000001.npz").exists()


def test_links_on_the_results_side_are_replaced_or_refused_and_never_written_through(
    run: SyntheticRun, results: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    steps = results / RUN / "steps"
    steps.mkdir(parents=True)
    (steps / "step_000001.npz.part").symlink_to(victim)
    (steps / "step_000002.npz").symlink_to(victim)
    assert collect(run.paths, results).manifest.state == "complete"
    assert victim.read_text() == "mine"
    assert not (steps / "step_000002.npz").is_symlink()
    shutil.rmtree(results)
    results.mkdir()
    (tmp_path / "outside").mkdir()
    (results / RUN).symlink_to(tmp_path / "outside")
    with pytest.raises(CorruptError):
        collect(run.paths, results)
    assert tree(tmp_path / "outside") == {}


def test_what_an_interrupted_collect_left_is_cleared_away(run: SyntheticRun, results: Path) -> None:
    steps = results / RUN / "steps"
    steps.mkdir(parents=True)
    for name in ("step_000001.npz.part", "step_000007.json.part"):
        (steps / name).write_bytes(b"half")
    collect(run.paths, results)
    assert not list(results.rglob("*.part"))


def test_trouble_with_the_results_ends_the_collect_and_trouble_with_the_source_does_not(
    run: SyntheticRun, results: Path
) -> None:
    (results / RUN).mkdir(parents=True)
    (results / RUN / "steps").write_text("a file stands here")
    with pytest.raises((CorruptError, StorageError)) as raised:
        collect(run.paths, results)
    assert raised.value.path is not None
    assert raised.value.path.is_relative_to(results)
