"""Which checkpoint a retry starts from, whatever a crash left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from influence.verl_engine.checkpoints import begin_checkpoint, checkpoint_attempt, settle_tracker


def save(
    directory: Path, step: int, *, attempt: int = 1, finished: bool = True, tracked: bool = True
) -> None:
    """What verl writes, in its order, as far as it got."""
    begin_checkpoint(directory, step, attempt)
    folder = directory / f"global_step_{step}"
    (folder / "actor").mkdir()
    (folder / "actor" / "model.pt").write_bytes(b"weights")
    if finished:
        (folder / "data.pt").write_bytes(b"data")
        if tracked:
            (directory / "latest_checkpointed_iteration.txt").write_text(str(step))


def tracker(directory: Path) -> str | None:
    path = directory / "latest_checkpointed_iteration.txt"
    return path.read_text() if path.exists() else None


def test_without_checkpoints_the_run_starts_from_scratch(tmp_path: Path) -> None:
    assert settle_tracker(tmp_path / "checkpoints", 1) == 0


def test_the_newest_finished_checkpoint_is_taken(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    save(tmp_path, 3, finished=False)
    assert settle_tracker(tmp_path, 4) == 2
    assert tracker(tmp_path) == "2"


def test_a_finished_checkpoint_that_is_not_tracked_yet_does_not_count(tmp_path: Path) -> None:
    # Its last file may be half written: the tracker that would say otherwise did not get written.
    save(tmp_path, 1)
    save(tmp_path, 2, tracked=False)
    assert settle_tracker(tmp_path, 3) == 1


@pytest.mark.parametrize("torn", ["", "\0\0", "1x"])
def test_a_torn_tracker_does_not_hide_the_checkpoint_that_it_was_written_for(
    tmp_path: Path, torn: str
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(torn)
    assert settle_tracker(tmp_path, 3) == 2
    assert tracker(tmp_path) == "2"


def test_a_checkpoint_of_an_uncommitted_step_is_never_resumed_from(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert settle_tracker(tmp_path, 2) == 1
    assert tracker(tmp_path) == "1"
    assert settle_tracker(tmp_path, 1) == 0
    assert tracker(tmp_path) is None
    assert (tmp_path / "global_step_2" / "data.pt").exists()


def test_a_tracker_without_its_checkpoint_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    assert settle_tracker(tmp_path, 6) == 0
    assert tracker(tmp_path) is None


def test_a_checkpoint_says_which_attempt_wrote_it(tmp_path: Path) -> None:
    save(tmp_path, 1, attempt=3)
    assert checkpoint_attempt(tmp_path, 1) == 3
    assert checkpoint_attempt(tmp_path, 2) is None
    (tmp_path / "global_step_1" / "influence.json").write_text("{")
    assert checkpoint_attempt(tmp_path, 1) is None


def test_beginning_a_checkpoint_clears_what_a_crash_left_in_its_place(tmp_path: Path) -> None:
    save(tmp_path, 1, attempt=1, finished=False)
    begin_checkpoint(tmp_path, 1, 2)
    assert [path.name for path in (tmp_path / "global_step_1").iterdir()] == ["influence.json"]
    assert checkpoint_attempt(tmp_path, 1) == 2
