from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from influence.rundir import (
    Attempt,
    AttemptRecord,
    CorruptError,
    FencedError,
    RunPaths,
    SchemaVersionError,
    Segment,
    claim_attempt,
    list_attempts,
    parse_time,
    read_attempt,
)

from .steps import commit, temporaries


def test_a_claim_says_who_it_is(paths: RunPaths) -> None:
    attempt = claim_attempt(paths, node="gpu-3", pod="infl-test-0221-x7", package_version="0.1.0")
    record = attempt.record
    assert attempt.number == record.number == 1
    assert (record.host, record.pid) == (os.uname().nodename, os.getpid())
    assert (record.node, record.pod, record.package_version) == ("gpu-3", "infl-test-0221-x7", "0.1.0")
    assert record.is_open and record.exit_code is None and record.resumed_from == 0
    assert record.segments == (Segment(1, 1, None),)
    assert parse_time(record.started_at).utcoffset().total_seconds() == 0
    assert list_attempts(paths) == [record]


def test_numbers_go_up_and_the_end_is_kept(paths: RunPaths) -> None:
    one = claim_attempt(paths)
    one.finish(137, "killed by SIGKILL (137)")
    two = claim_attempt(paths)
    records = list_attempts(paths)
    assert [record.number for record in records] == [1, 2]
    assert not records[0].is_open and records[0].exit_code == 137
    assert records[0].reason == "killed by SIGKILL (137)"
    assert parse_time(records[0].ended_at) >= parse_time(records[0].started_at)
    assert records[1].is_open
    two.finish(-15, "asked to stop")
    assert read_attempt(paths, 2).exit_code == -15
    assert temporaries(paths.root_dir) == []


def test_two_processes_of_one_attempt_keep_each_others_entries(paths: RunPaths) -> None:
    parent = claim_attempt(paths)
    commit(paths, parent, 1)
    parent = claim_attempt(paths)
    child = Attempt(paths, parent.number)
    child.set_resume(1, from_attempt=1)
    parent.finish(0, "all steps committed (0)")
    record = parent.record
    assert (record.resumed_from, record.exit_code) == (1, 0)
    assert record.segments == (Segment(1, 1, 1), Segment(2, 2, None))


def test_a_later_claim_fences(paths: RunPaths) -> None:
    one = claim_attempt(paths)
    assert not one.fenced()
    one.require_unfenced()
    two = claim_attempt(paths)
    assert one.fenced() and not two.fenced()
    with pytest.raises(FencedError) as error:
        one.require_unfenced()
    assert (error.value.attempt, error.value.by) == (1, 2)
    assert error.value.path == paths.attempt(2)


def test_a_claim_removes_what_lower_attempts_left_half_written(paths: RunPaths) -> None:
    claim_attempt(paths)
    claim_attempt(paths)
    paths.replays_of(2).mkdir(parents=True)
    gone = [
        paths.steps_dir / ".step_000001.npz.attempt-0001.77-ab.tmp",
        paths.steps_dir / ".step_000001.json.attempt-0002.78-ab.tmp",
        paths.replays_of(2) / ".step_000001.npz.attempt-0002.78-ab.tmp",
    ]
    kept = [
        paths.steps_dir / ".step_000001.npz.attempt-0003.79-ab.tmp",
        paths.steps_dir / "step_000001.npz",
        paths.steps_dir / "notes.tmp",
    ]
    for path in [*gone, *kept]:
        path.touch()
    assert claim_attempt(paths).number == 3
    assert not any(path.exists() for path in gone) and all(path.exists() for path in kept)


def _claim(root_dir: Path, barrier, results) -> None:
    barrier.wait()
    results.put(claim_attempt(RunPaths(root_dir)).number)


def test_eight_claims_at_once_get_eight_numbers(paths: RunPaths) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    processes = [context.Process(target=_claim, args=(paths.root_dir, barrier, results)) for _ in range(8)]
    for process in processes:
        process.start()
    numbers = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert numbers == list(range(1, 9))
    assert [record.number for record in list_attempts(paths)] == numbers
    assert len({record.pid for record in list_attempts(paths)}) == 8
    assert temporaries(paths.root_dir) == []


def test_a_number_that_is_taken_elsewhere_is_passed_over(paths: RunPaths) -> None:
    claim_attempt(paths)
    asked: list[AttemptRecord] = []

    def reserve(record: AttemptRecord) -> bool:
        assert not paths.attempt(record.number).exists()  # elsewhere first: that is where all can see it
        asked.append(record)
        return record.number >= 4

    assert claim_attempt(paths, reserve=reserve).number == 4
    assert [record.number for record in asked] == [2, 3, 4]
    assert asked[-1] == read_attempt(paths, 4)
    assert paths.attempt_numbers() == [1, 4]


@pytest.mark.parametrize("content", ["", '{"number": 1', "[1]", "null"])
def test_a_torn_record_is_named(paths: RunPaths, content: str) -> None:
    claim_attempt(paths)
    claim_attempt(paths)
    paths.attempt(1).write_text(content)
    with pytest.raises(CorruptError) as error:
        list_attempts(paths)
    assert error.value.path == paths.attempt(1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"number": 2}, "number is 2"),
        ({"pid": True}, "pid is True"),
        ({"pid": -1}, "pid is -1"),
        ({"host": None}, "host is None"),
        ({"started_at": "yesterday"}, "started_at is 'yesterday'"),
        ({"started_at": "2026-02-21T09:30:00"}, "not a time in ISO 8601 with its zone"),
        ({"exit_code": 256}, "exit_code is 256"),
        ({"exit_code": "0"}, "exit_code is '0'"),
        ({"resumed_from": 2**63}, "resumed_from is 9223372036854775808"),
        ({"resumed_from": 1}, "segments do not end with attempt 1 from step 2 on"),
        ({"segments": []}, "segments do not end"),
        ({"segments": [[1, 1]]}, "segments holds [1, 1]"),
        ({"segments": [[1, 1, 0]]}, "segments holds [1, 1, 0]"),
        ({"segments": [[1, 1, None], [1, 2, None]]}, "segments holds [1, 2, None]"),
        ({"segments": "1"}, "segments is '1'"),
        ({"node": 5}, "node is 5"),
    ],
)
def test_a_record_that_cannot_be_is_named(paths: RunPaths, changes: dict[str, object], words: str) -> None:
    claim_attempt(paths)
    document = json.loads(paths.attempt(1).read_text())
    paths.attempt(1).write_text(json.dumps({**document, **changes}))
    with pytest.raises(CorruptError) as error:
        list_attempts(paths)
    assert words in error.value.reason and error.value.path == paths.attempt(1)


def test_another_schema_version_is_named(paths: RunPaths) -> None:
    claim_attempt(paths)
    paths.attempt(1).write_text(json.dumps({"schema_version": 2}))
    with pytest.raises(SchemaVersionError, match="2, this installation reads version 1"):
        list_attempts(paths)


def test_an_attempt_that_nobody_claimed(paths: RunPaths) -> None:
    with pytest.raises(CorruptError, match="is not there"):
        Attempt(paths, 1).finish(0, "")
    assert list_attempts(paths) == []
