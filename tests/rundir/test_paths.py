from __future__ import annotations

from pathlib import Path

import pytest

from influence.rundir import CorruptError, RunNameError, RunPaths, list_attempts

# The tree of ARCHITECTURE.md, word for word.
TREE = {
    "run_json": "run.json",
    "attempts_dir": "attempts",
    "logs_dir": "logs",
    "metrics_dir": "metrics",
    "steps_dir": "steps",
    "replays_dir": "replays",
    "checkpoints_dir": "checkpoints",
    "wandb_dir": "wandb",
    "local_dir": "local",
    "supervisor_json": "local/supervisor.json",
    "events_jsonl": "local/events.jsonl",
    "supervisor_log": "local/supervisor.log",
    "cancel_file": "local/cancel",
}


def test_the_tree(tmp_path: Path) -> None:
    paths = RunPaths.of(tmp_path, "infl-a")
    assert paths.root_dir == tmp_path / "infl-a" and paths.name == "infl-a"
    for attribute, place in TREE.items():
        assert getattr(paths, attribute) == tmp_path / "infl-a" / place
    below = paths.root_dir
    assert paths.attempt(1) == below / "attempts/0001.json"
    assert paths.log(1) == below / "logs/attempt-0001.log"
    assert paths.metrics(12) == below / "metrics/attempt-0012.jsonl"
    assert paths.step_npz(1) == below / "steps/step_000001.npz"
    assert paths.step_record(1_234_567) == below / "steps/step_1234567.json"
    assert paths.replay_npz(2, 1) == below / "replays/attempt-0002/step_000001.npz"
    assert paths.replay_record(10_000, 1) == below / "replays/attempt-10000/step_000001.json"
    assert not paths.root_dir.exists()


def test_numbers_come_back_from_names_and_strangers_are_overlooked(tmp_path: Path) -> None:
    paths = RunPaths.of(tmp_path, "infl-a")
    assert paths.attempt_numbers() == paths.committed_step_numbers() == []
    for directory in (paths.attempts_dir, paths.steps_dir, paths.replays_of(2), paths.replays_of(10_000)):
        directory.mkdir(parents=True)
    for number in (1, 2, 9999, 10_000):
        paths.attempt(number).touch()
    for step in (1, 999_999, 1_000_000):
        paths.step_record(step).touch()
        paths.replay_record(10_000, step).touch()
    for stranger in ("0000.json", "00003.json", "٠٠٠٤.json", "0005.json.tmp", ".0006.json", "0007.JSON"):
        (paths.attempts_dir / stranger).touch()
    for stranger in ("step_0000002.json", "step_000000.json", "step_3.json", ".step_000004.json.x.1-2.tmp"):
        (paths.steps_dir / stranger).touch()
    assert paths.attempt_numbers() == [1, 2, 9999, 10_000]
    assert paths.committed_step_numbers() == [1, 999_999, 1_000_000]
    assert paths.replayed_step_numbers() == {2: [], 10_000: [1, 999_999, 1_000_000]}


@pytest.mark.parametrize("name", ["..", "../x", "/etc", "a/b", ""])
def test_a_name_cannot_leave_the_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunNameError):
        RunPaths.of(tmp_path, name)


def test_a_link_in_the_place_of_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "infl-a").symlink_to(tmp_path / "elsewhere")
    for make in (
        lambda: RunPaths.of(tmp_path / "runs", "infl-a"),
        lambda: RunPaths.at(tmp_path / "runs/infl-a"),
    ):
        with pytest.raises(CorruptError, match="symbolic link"):
            make()
    (tmp_path / "link-to-runs").symlink_to(tmp_path / "runs")
    assert RunPaths.of(tmp_path / "link-to-runs", "infl-b").name == "infl-b"


def test_at_is_the_run_that_a_path_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "infl-a" / "steps").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "infl-a" / "steps")
    assert RunPaths.at("..") == RunPaths.at(tmp_path / "infl-a/") == RunPaths.of(tmp_path, "infl-a")


@pytest.mark.parametrize("stand_in", ["link", "file"])
def test_a_directory_that_is_none_is_named(tmp_path: Path, stand_in: str) -> None:
    paths = RunPaths.of(tmp_path, "infl-a")
    paths.root_dir.mkdir()
    if stand_in == "link":
        paths.attempts_dir.symlink_to(tmp_path)
    else:
        paths.attempts_dir.touch()
    with pytest.raises(CorruptError, match="stands where a directory should") as error:
        list_attempts(paths)
    assert error.value.path == paths.attempts_dir
