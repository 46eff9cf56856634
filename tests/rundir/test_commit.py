from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from influence.rundir import (
    Attempt,
    ConflictError,
    CorruptError,
    FencedError,
    NotARunError,
    RunPaths,
    Segment,
    StepWriter,
    StorageError,
    claim_attempt,
    committed_steps,
    decode,
    encode,
    parse_time,
    read_run,
    verify_step,
)
from influence.rundir.record import read_record

from .steps import STORE, commit, new_run, step_arrays, temporaries, tree, writer


def test_a_commit_is_the_file_and_a_record_of_it(paths: RunPaths) -> None:
    arrays = replace(step_arrays(5), scores=np.array([1, np.nan, 2, np.nan, 0], dtype=np.float32))
    record = writer(paths, claim_attempt(paths)).commit(
        1, arrays, timings={"pop_rows": np.float32(0.5)}, metrics={"rows_emitted": 3, "grad_norm": math.inf}
    )
    data = paths.step_npz(1).read_bytes()
    assert data == encode(arrays)
    assert (record.step, record.file, record.bytes) == (1, "step_000001.npz", len(data))
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    assert (record.rows, record.positions, record.nan_count) == (3, 5, 2)
    assert (record.attempt, record.resumed_from, record.lineage) == (1, 0, (Segment(1, 1, 1),))
    assert (record.replay, record.equal) == (False, False)
    assert record.spec_hash == read_run(paths).spec_hash
    assert record.timings == {"pop_rows": 0.5} and record.metrics == {
        "rows_emitted": 3.0,
        "grad_norm": math.inf,
    }
    parse_time(record.committed_at)
    assert committed_steps(paths) == {1: record}
    assert verify_step(paths, record).status == "ok"
    assert set(tree(paths.steps_dir)) == {"step_000001.npz", "step_000001.json"}


def test_the_store_decides_what_is_kept(paths: RunPaths) -> None:
    attempt = claim_attempt(paths)
    store = {"scores_dtype": "float16", "columns": ["log_probs"]}
    StepWriter(paths, attempt.number, read_run(paths).spec_hash, store=store).commit(
        1, step_arrays(), timings={}, metrics={}
    )
    stored = decode(paths.step_npz(1))
    assert stored.log_probs is not None and stored.token_ids is None and stored.advantages is None
    with np.load(paths.step_npz(1)) as archive:
        assert archive["scores"].dtype == np.float16


@pytest.mark.parametrize("same_bytes", [True, False])
def test_a_committed_step_is_never_touched_again(paths: RunPaths, same_bytes: bool) -> None:
    first = commit(paths, claim_attempt(paths), 1, seed=1)
    before = tree(paths.steps_dir)
    stat_before = paths.step_npz(1).stat()
    replay = commit(paths, claim_attempt(paths), 1, seed=1 if same_bytes else 2)
    assert tree(paths.steps_dir) == before
    assert paths.step_npz(1).stat().st_ino == stat_before.st_ino
    assert replay.replay and replay.equal is same_bytes and replay.attempt == 2
    kept = {"attempt-0002/step_000001.json"} | (set() if same_bytes else {"attempt-0002/step_000001.npz"})
    assert set(tree(paths.replays_dir)) == kept
    assert replay.npz(paths) == (paths.step_npz(1) if same_bytes else paths.replay_npz(2, 1))
    assert replay.path(paths) == paths.replay_record(2, 1)
    assert verify_step(paths, replay).status == verify_step(paths, first).status == "ok"
    assert committed_steps(paths, "first") == {1: first}
    assert committed_steps(paths, "final") == {1: replay}


def test_an_equal_replay_of_a_damaged_file_keeps_its_own(paths: RunPaths) -> None:
    first = commit(paths, claim_attempt(paths), 1)
    paths.step_npz(1).write_bytes(b"damaged")
    replay = commit(paths, claim_attempt(paths), 1)
    assert replay.sha256 == first.sha256 and not replay.equal
    assert verify_step(paths, replay).status == "ok"
    assert paths.step_npz(1).read_bytes() == b"damaged"


@pytest.mark.parametrize("same_bytes", [True, False])
def test_a_committed_file_that_is_gone_is_not_replaced_by_another(paths: RunPaths, same_bytes: bool) -> None:
    first = commit(paths, claim_attempt(paths), 1, seed=1)
    paths.step_npz(1).unlink()
    replay = commit(paths, claim_attempt(paths), 1, seed=1 if same_bytes else 2)
    assert not replay.equal and verify_step(paths, replay).status == "ok"
    assert verify_step(paths, first).status == "missing"


def test_to_commit_the_same_again_changes_nothing(paths: RunPaths) -> None:
    for _ in range(2):  # the first commit of the step, and a replay
        attempt = claim_attempt(paths)
        record = commit(paths, attempt, 1, seed=attempt.number)
        before = tree(paths.root_dir)
        assert commit(paths, attempt, 1, seed=attempt.number) == record
        with pytest.raises(ValueError, match="with other bytes before"):
            commit(paths, attempt, 1, seed=99)
        assert tree(paths.root_dir) == before


@pytest.mark.parametrize("content", ["same", "other", "torn"])
def test_an_npz_without_a_record_is_taken_over(paths: RunPaths, content: str) -> None:
    ours = encode(step_arrays(1))
    orphan = {"same": ours, "other": encode(step_arrays(2)), "torn": ours[:100]}[content]
    paths.step_npz(1).write_bytes(orphan)
    assert committed_steps(paths) == {}
    record = commit(paths, claim_attempt(paths), 1, seed=1)
    assert not record.replay and verify_step(paths, record).status == "ok"
    assert tree(paths.steps_dir).keys() == {"step_000001.npz", "step_000001.json"}
    assert paths.step_npz(1).read_bytes() == ours


def test_a_link_in_the_place_of_an_npz_goes_and_its_target_stays(paths: RunPaths, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(encode(step_arrays(1)))
    paths.step_npz(1).symlink_to(tmp_path / "target")
    commit(paths, claim_attempt(paths), 1, seed=1)
    assert not paths.step_npz(1).is_symlink() and (tmp_path / "target").exists()


def test_a_fenced_attempt_writes_nothing(paths: RunPaths) -> None:
    old = claim_attempt(paths)
    commit(paths, old, 1)
    old_writer = writer(paths, old)
    claim_attempt(paths)
    before = tree(paths.root_dir)
    for step in (1, 2):
        with pytest.raises(FencedError) as error:
            old_writer.commit(step, step_arrays(), timings={}, metrics={})
        assert (error.value.attempt, error.value.by) == (1, 2)
    assert tree(paths.root_dir) == before


def test_the_lineage_of_a_resumed_attempt(paths: RunPaths) -> None:
    one = claim_attempt(paths)
    for step in (1, 2, 3):
        commit(paths, one, step)
    two = claim_attempt(paths)
    two.set_resume(2, from_attempt=1)
    two_writer = writer(paths, two)
    replay = two_writer.commit(3, step_arrays(9), timings={}, metrics={})
    assert replay.replay and replay.resumed_from == 2
    assert replay.lineage == (Segment(1, 1, 2), Segment(2, 3, 3))
    later = two_writer.commit(4, step_arrays(9), timings={}, metrics={})
    assert not later.replay and later.lineage == (Segment(1, 1, 2), Segment(2, 3, 4))
    with pytest.raises(ValueError, match="step 2 is not above step 2"):
        two_writer.commit(2, step_arrays(), timings={}, metrics={})


def test_a_writer_needs_a_run_a_claim_and_the_runs_own_spec(paths: RunPaths, tmp_path: Path) -> None:
    spec_hash = read_run(paths).spec_hash
    with pytest.raises(NotARunError):
        StepWriter(RunPaths.of(tmp_path, "infl-none"), 1, spec_hash, store=STORE)
    with pytest.raises(CorruptError, match="claim an attempt"):
        StepWriter(paths, 1, spec_hash, store=STORE)
    claim_attempt(paths)
    with pytest.raises(ConflictError, match=r"spec_hash: sha256:[0-9a-f]+ -> sha256:0"):
        StepWriter(paths, 1, "sha256:0", store=STORE)
    for store in ({"scores_dtype": "float64"}, {"columns": ["tokens"]}):
        with pytest.raises(ValueError):
            StepWriter(paths, 1, spec_hash, store=store)


def test_wrong_arrays_leave_nothing(paths: RunPaths) -> None:
    attempt = claim_attempt(paths)
    before = tree(paths.root_dir)
    with pytest.raises(ValueError, match="reward has 2 values"):
        writer(paths, attempt).commit(
            1, replace(step_arrays(), reward=np.zeros(2, dtype=np.float32)), timings={}, metrics={}
        )
    assert tree(paths.root_dir) == before


@pytest.mark.parametrize("operation", ["write", "fsync", "link"])
@pytest.mark.parametrize("occurrence", [0, 1])
def test_a_full_disk_leaves_no_commit_and_no_temporaries(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch, operation: str, occurrence: int
) -> None:
    attempt = claim_attempt(paths)
    real, calls = getattr(os, operation), []

    def full(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) > occurrence:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, full)
        with pytest.raises(StorageError, match="no space left"):
            commit(paths, attempt, 1)
    assert committed_steps(paths) == {} and temporaries(paths.root_dir) == []
    assert not commit(paths, attempt, 1).replay  # there is space again
    assert verify_step(paths, committed_steps(paths)[1]).status == "ok"


def test_a_disk_that_is_really_full(small_filesystem: Path) -> None:
    paths = new_run(small_filesystem)
    attempt = claim_attempt(paths)
    commit(paths, attempt, 1)
    before = tree(paths.root_dir)
    large = step_arrays(lengths=(30_000,))
    with pytest.raises(StorageError, match="no space left on the device") as error:
        writer(paths, attempt).commit(2, large, timings={}, metrics={})
    assert error.value.path == paths.step_npz(2) and "committed steps are kept" in error.value.next_step
    assert tree(paths.root_dir) == before
    assert commit(paths, attempt, 2).step == 2


def test_a_temporary_file_that_a_later_claim_removed_means_fenced(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = claim_attempt(paths)
    real = Attempt.require_unfenced
    checks = []

    def slow_to_notice(self: Attempt) -> None:
        real(self)
        checks.append(self)
        if len(checks) == 2:  # between the look for a later attempt and the file's name
            claim_attempt(paths)

    monkeypatch.setattr(Attempt, "require_unfenced", slow_to_notice)
    with pytest.raises(FencedError):
        commit(paths, attempt, 1)
    assert tree(paths.steps_dir) == {}


BAD_RECORDS = [
    ({"step": 2}, "file is 'step_000001.npz', which is not the name of step 2's NPZ"),
    ({"step": 0}, "step is 0"),
    ({"step": "1"}, "step is '1'"),
    ({"file": "../../../etc/passwd"}, "file is '../../../etc/passwd'"),
    ({"file": "/etc/passwd"}, "file is '/etc/passwd'"),
    ({"file": "step_000002.npz"}, "file is 'step_000002.npz'"),
    ({"sha256": "X" * 64}, "sha256 is"),
    ({"sha256": None}, "sha256 is None"),
    ({"bytes": 0}, "bytes is 0"),
    ({"bytes": 1.5}, "bytes is 1.5"),
    ({"rows": -1}, "rows is -1"),
    ({"nan_count": 6}, "nan_count is 6"),
    ({"attempt": 0}, "attempt is 0"),
    ({"attempt": 2}, "lineage does not end with attempt 2"),
    ({"resumed_from": 1}, "resumed_from is 1"),
    ({"lineage": [[1, 1, None]]}, "lineage does not end"),
    ({"lineage": [[1, 2, 2]]}, "lineage holds [1, 2, 2]"),
    ({"replay": True}, "lies in another one's place"),
    ({"equal": True}, "equal is true, but it is no replay"),
    ({"equal": 1}, "equal is 1"),
    ({"committed_at": 5}, "committed_at is 5"),
    ({"timings": {"a": "x"}}, "timings.a is 'x'"),
    ({"timings": {"a": 10**400}}, "timings.a is 1000"),
    ({"metrics": []}, "metrics is []"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_RECORDS)
def test_a_record_that_cannot_be_is_named_and_not_used(
    paths: RunPaths, changes: dict[str, object], words: str
) -> None:
    commit(paths, claim_attempt(paths), 1)
    document = json.loads(paths.step_record(1).read_text())
    paths.step_record(1).write_text(json.dumps({**document, **changes}))
    with pytest.raises(CorruptError) as error:
        committed_steps(paths)
    assert words in error.value.reason and error.value.path == paths.step_record(1)
    damaged: list[CorruptError] = []
    assert committed_steps(paths, damaged=damaged) == {}
    assert [str(one) for one in damaged] == [str(error.value)]


def test_a_record_in_another_steps_place_is_named(paths: RunPaths) -> None:
    commit(paths, claim_attempt(paths), 1)
    paths.step_record(2).write_bytes(paths.step_record(1).read_bytes())
    with pytest.raises(CorruptError, match="is the record of step 1"):
        read_record(paths, 2)
    paths.replays_of(2).mkdir(parents=True)
    paths.replay_record(2, 1).write_bytes(paths.step_record(1).read_bytes())
    with pytest.raises(CorruptError, match="lies in another one's place"):
        read_record(paths, 1, 2)


def test_numbers_that_json_lacks_come_back(paths: RunPaths) -> None:
    metrics = {"nan": math.nan, "up": math.inf, "down": -math.inf, "tiny": 5e-324, "whole": 3}
    writer(paths, claim_attempt(paths)).commit(1, step_arrays(), timings={}, metrics=metrics)
    back = read_record(paths, 1).metrics
    assert math.isnan(back.pop("nan"))
    assert back == {"up": math.inf, "down": -math.inf, "tiny": 5e-324, "whole": 3.0}
