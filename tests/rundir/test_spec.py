from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influence.rundir import (
    ConflictError,
    CorruptError,
    NotARunError,
    RunPaths,
    RunSpec,
    SchemaVersionError,
    canonical_json,
    create_run,
    difference,
    read_run,
    spec_hash,
)

from .steps import RUN, SPEC, tree

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
SPECS = st.dictionaries(st.text(), VALUES, max_size=4)


def test_canonical_json_is_what_it_says() -> None:
    assert canonical_json({"b": [1, 1.0, True, None], "a": "ü"}) == '{"a":"ü","b":[1,1.0,true,null]}'.encode()
    assert spec_hash({}) == "sha256:" + hashlib.sha256(b"{}").hexdigest()


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "\ud800", {1: 2}, {"a": {None: 1}}, {"a": {1}}]
)
def test_what_json_would_change_or_not_hold_is_refused(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        canonical_json({"x": [value]})


@given(SPECS)
@settings(max_examples=50, deadline=None)
def test_a_hash_survives_json_and_the_order_of_keys(spec: dict[str, object]) -> None:
    try:
        expected = spec_hash(spec)
    except UnicodeEncodeError:
        return
    assert spec_hash(json.loads(json.dumps(spec))) == expected
    assert spec_hash(dict(reversed(spec.items()))) == expected
    document = json.loads(json.dumps(RunSpec.new(RUN, spec).to_dict()))
    assert RunSpec.from_dict(document) == RunSpec.new(RUN, spec)


def test_the_first_creates_and_the_same_again_adopts(tmp_path: Path) -> None:
    paths = RunPaths.of(tmp_path, RUN)
    run_spec = RunSpec.new(RUN, SPEC, provenance={"user": "a"}, wandb={"mode": "offline", "run_id": RUN})
    assert create_run(paths, run_spec) is True
    before = tree(tmp_path)
    assert create_run(paths, replace(run_spec, provenance={"user": "b"})) is False
    assert tree(tmp_path) == before
    assert read_run(paths) == run_spec


def test_another_spec_is_a_conflict_that_changes_nothing(paths: RunPaths) -> None:
    before = tree(paths.root_dir)
    changed = {**SPEC, "influence": {"damping": 0.2, "scope": "batch"}}
    with pytest.raises(ConflictError) as error:
        create_run(paths, RunSpec.new(RUN, changed))
    assert error.value.difference == ["influence.damping: 0.1 -> 0.2", 'influence.scope: (absent) -> "batch"']
    assert "influence.damping: 0.1 -> 0.2" in str(error.value)
    assert tree(paths.root_dir) == before


def test_a_directory_without_run_json_is_no_run(tmp_path: Path) -> None:
    paths = RunPaths.of(tmp_path, RUN)
    for _ in range(2):
        with pytest.raises(NotARunError, match=r"no run\.json") as error:
            read_run(paths)
        assert error.value.path == paths.root_dir
        paths.root_dir.mkdir(exist_ok=True)


@pytest.mark.parametrize("version", [0, 2, "1", True, 1.0, None])
def test_another_schema_version_is_named_before_anything_else_is_read(
    paths: RunPaths, version: object
) -> None:
    paths.run_json.write_text(json.dumps({"schema_version": version}))
    for use in (lambda: read_run(paths), lambda: create_run(paths, RunSpec.new(RUN, SPEC))):
        with pytest.raises(SchemaVersionError) as error:
            use()
        assert error.value.path == paths.run_json
        assert repr(version) in error.value.reason and "reads version 1" in error.value.reason


def altered(document: dict[str, object], **changes: object) -> dict[str, object]:
    document = {**document, **changes}
    return {key: value for key, value in document.items() if value is not ...}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spec": {"preset": "other"}}, "one was altered"),
        ({"spec_hash": "sha256:0"}, "one was altered"),
        ({"spec": []}, "spec is []"),
        ({"spec": {"x": "\ud800"}}, "could not have been written"),
        ({"provenance": {"user": "\ud800"}}, "could not have been written"),
        ({"wandb": {"\ud800": 1}}, "could not have been written"),
        ({"run": 3}, "run is 3"),
        ({"wandb": ...}, "wandb is missing"),
        ({"provenance": None}, "provenance is None"),
    ],
)
def test_a_run_json_that_was_altered_is_named(
    paths: RunPaths, changes: dict[str, object], words: str
) -> None:
    document = json.loads(paths.run_json.read_text())
    paths.run_json.write_text(json.dumps(altered(document, **changes)))
    with pytest.raises(CorruptError) as error:
        read_run(paths)
    assert words in error.value.reason and error.value.path == paths.run_json


def test_a_spec_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    paths = RunPaths.of(tmp_path, RUN)
    with pytest.raises(ValueError, match=r"run\.json: half of a surrogate pair") as error:
        create_run(paths, RunSpec.new(RUN, SPEC, provenance={"user": "a\udcff"}))
    assert "user" in str(error.value) and not isinstance(error.value, UnicodeError)
    assert list(paths.root_dir.iterdir()) == []


def test_a_copy_of_a_run_under_another_name_is_no_run(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = RunPaths.of(paths.root_dir.parent, "infl-copy")
    shutil.copytree(paths.root_dir, copy.root_dir)
    before = tree(copy.root_dir)
    for use in (lambda: read_run(copy), lambda: create_run(copy, RunSpec.new("infl-copy", SPEC))):
        with pytest.raises(CorruptError) as error:
            use()
        assert f"is of the run '{RUN}', but lies in 'infl-copy'" in error.value.reason
        assert "name back" in error.value.next_step
    assert tree(copy.root_dir) == before
    monkeypatch.chdir(paths.root_dir)
    link = paths.root_dir.parent / "latest"
    link.symlink_to(paths.root_dir)
    assert read_run(RunPaths(Path())) == read_run(RunPaths(link)) == read_run(paths)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"run"'])
def test_a_run_json_that_is_torn_is_named(paths: RunPaths, content: str) -> None:
    paths.run_json.write_text(content)
    with pytest.raises(CorruptError):
        read_run(paths)


def test_a_wrong_hash_or_name_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="spec_hash"):
        create_run(RunPaths.of(tmp_path, RUN), replace(RunSpec.new(RUN, SPEC), spec_hash="sha256:0"))
    with pytest.raises(ValueError, match="infl-other"):
        create_run(RunPaths.of(tmp_path, RUN), RunSpec.new("infl-other", SPEC))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("a", "b", "lines"),
    [
        ({}, {}, []),
        ({"x": 1}, {"x": 1}, []),
        ({"x": 1}, {"x": 1.0}, ["x: 1 -> 1.0"]),
        ({"x": 1}, {"x": True}, ["x: 1 -> true"]),
        ({"x": {"y": {"z": 1}}}, {"x": {"y": {}}}, ["x.y: (absent) -> {}", "x.y.z: 1 -> (absent)"]),
        ({"x": {"y": 1}}, {"x.y": 1}, ["x.y: 1 -> (absent)", "x.y: (absent) -> 1"]),
        ({"x": [1]}, {"x": [1, 2]}, ["x: [1] -> [1, 2]"]),
        ({"x": "\x1b[31m"}, {"x": None}, [r'x: "\u001b[31m" -> null']),
    ],
)
def test_differences(a: dict[str, object], b: dict[str, object], lines: list[str]) -> None:
    assert difference(a, b) == lines


@given(SPECS, SPECS)
@settings(max_examples=50, deadline=None)
def test_there_are_differences_exactly_where_the_hashes_differ(
    a: dict[str, object], b: dict[str, object]
) -> None:
    try:
        equal = spec_hash(a) == spec_hash(b)
    except UnicodeEncodeError:
        return
    assert (difference(a, b) == []) == equal
    assert difference(a, json.loads(json.dumps(a))) == []


def _create(root: Path, damping: float, barrier: multiprocessing.synchronize.Barrier, results) -> None:
    barrier.wait()
    try:
        results.put(create_run(RunPaths.of(root, RUN), RunSpec.new(RUN, {"damping": damping})))
    except ConflictError as error:
        results.put(error.difference)


@pytest.mark.parametrize("same", [True, False])
def test_of_many_creators_at_once_one_creates(tmp_path: Path, same: bool) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.Queue()
    processes = [
        context.Process(target=_create, args=(tmp_path, 0.1 if same else i / 10, barrier, results))
        for i in range(6)
    ]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert outcomes.count(True) == 1
    if same:
        assert outcomes.count(False) == 5
    else:
        winner = read_run(RunPaths.of(tmp_path, RUN)).spec["damping"]
        others = {f"damping: {winner} -> {i / 10}" for i in range(6) if i / 10 != winner}
        assert {outcome[0] for outcome in outcomes if outcome is not True} == others
