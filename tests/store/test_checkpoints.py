"""Checkpoints in the store: complete ones, of one attempt each, checked when they come back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from influence.rundir import CorruptError
from influence.store import checkpoints
from influence.store.checkpoints import StoredCheckpoint
from influence.store.run_store import RunStore

from .conftest import stored
from .s3_server import Request, S3Server

YES, NO = (lambda: True), (lambda: False)


def save(run: RunStore, step: int, text: str = "weights") -> Path:
    folder = run.paths.checkpoints_dir / f"global_step_{step}"
    (folder / "actor").mkdir(parents=True)
    (folder / "actor" / "model.pt").write_text(f"{text} {step}")
    (folder / "data.pt").write_text("data")
    return folder


def send(run: RunStore, step: int, attempt: int = 1, text: str = "weights") -> None:
    assert checkpoints.send(run, attempt, step, save(run, step, text), YES)


def restore(run: RunStore, first_missing_step: int) -> tuple[int, list[str]]:
    said: list[str] = []
    return checkpoints.restore(run, first_missing_step, said.append, NO), said


def weights(run: RunStore, step: int) -> str:
    return (run.paths.checkpoints_dir / f"global_step_{step}" / "actor" / "model.pt").read_text()


def test_the_newest_before_the_first_missing_step_comes_back(
    on_a_fresh_disk: Callable[[], RunStore],
) -> None:
    run = on_a_fresh_disk()
    for step in (1, 2, 3):
        send(run, step)
    other = on_a_fresh_disk()
    assert restore(other, 3) == (2, [])
    assert [path.name for path in other.paths.checkpoints_dir.iterdir()] == ["global_step_2"]
    assert weights(other, 2) == "weights 2"
    assert restore(other, 1) == (0, [])


def test_a_damaged_one_is_named_and_the_next_older_taken(on_a_fresh_disk: Callable[[], RunStore]) -> None:
    run = on_a_fresh_disk()
    for step in (1, 2):
        send(run, step)
    run.objects.put("checkpoints/attempt-0001/step_000002/actor/model.pt", b"Weights 2")
    other = on_a_fresh_disk()
    step, said = restore(other, 9)
    assert step == 1
    assert "step_000002.json" in said[0] and "actor/model.pt" in said[0]
    assert [path.name for path in other.paths.checkpoints_dir.iterdir()] == ["global_step_1"]


@pytest.mark.parametrize("gone", ["step_000002/data.pt", "step_000002.json"])
def test_an_incomplete_one_is_none(on_a_fresh_disk: Callable[[], RunStore], gone: str) -> None:
    run = on_a_fresh_disk()
    for step in (1, 2):
        send(run, step)
    run.objects.delete([f"checkpoints/attempt-0001/{gone}"])
    assert restore(on_a_fresh_disk(), 9)[0] == 1


def test_of_one_step_the_later_attempts_is_taken_and_files_never_mix(
    on_a_fresh_disk: Callable[[], RunStore],
) -> None:
    send(on_a_fresh_disk(), 2, attempt=2, text="of attempt 2:")
    send(on_a_fresh_disk(), 2, attempt=1, text="of attempt 1:")  # from one that was taken for dead
    other = on_a_fresh_disk()
    assert restore(other, 9)[0] == 2
    assert weights(other, 2) == "of attempt 2: 2"


def test_old_ones_and_leftovers_are_removed_but_never_a_later_attempts(
    on_a_fresh_disk: Callable[[], RunStore],
) -> None:
    run = on_a_fresh_disk()
    for step in (1, 2, 3):
        send(run, step, attempt=2)
    run.objects.put("checkpoints/attempt-0001/step_000009/data.pt", b"never completed")
    run.objects.put("checkpoints/attempt-0003/step_000004/data.pt", b"being sent")
    checkpoints.prune(run, 2, keep=2)
    left = {key.rpartition("/")[0] if "step_000004/" in key else key for key in stored(run.objects)}
    assert {key for key in left if key.endswith(".json")} == {
        "checkpoints/attempt-0002/step_000002.json",
        "checkpoints/attempt-0002/step_000003.json",
    }
    assert "checkpoints/attempt-0003/step_000004" in left
    assert not [key for key in left if "attempt-0001" in key or "step_000001" in key]
    assert restore(on_a_fresh_disk(), 9)[0] == 3


def test_verl_may_remove_a_checkpoint_while_it_is_sent(
    server: S3Server, on_a_fresh_disk: Callable[[], RunStore]
) -> None:
    run = on_a_fresh_disk()
    folder = save(run, 1)

    def remove(request: Request) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    server.between.before = remove
    assert checkpoints.send(run, 1, 1, folder, YES)
    assert not folder.exists()
    other = on_a_fresh_disk()
    assert restore(other, 9)[0] == 1
    assert weights(other, 1) == "weights 1"
    assert not (run.paths.checkpoints_dir / ".sending" / "global_step_1").exists()


def test_one_that_verl_may_be_removing_is_not_sent(on_a_fresh_disk: Callable[[], RunStore]) -> None:
    """What is left of it could be taken for all of it."""
    run = on_a_fresh_disk()
    folder = save(run, 1)
    shutil.rmtree(folder / "actor")
    assert not checkpoints.send(run, 1, 1, folder, NO)
    assert stored(run.objects) == {}


def test_a_restore_can_be_stopped_and_leaves_nothing(on_a_fresh_disk: Callable[[], RunStore]) -> None:
    send(on_a_fresh_disk(), 1)
    other = on_a_fresh_disk()
    with pytest.raises(InterruptedError):
        checkpoints.restore(other, 9, print, lambda: True)
    assert list(other.paths.checkpoints_dir.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../../evil": [1, "0"]}},
        {"files": {"/evil": [1, "0"]}},
        {"files": {"a": "b"}},
        {"folder": "../evil"},
        {"folder": ""},
        {"step": 0},
        {"schema_version": 99},
    ],
)
def test_a_manifest_that_leads_elsewhere_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    good = StoredCheckpoint(step=1, attempt=1, folder="global_step_1", files={"data.pt": (1, "0")})
    document = {**good.to_dict(), **change}
    with pytest.raises(Exception, match=r"manifest") as caught:
        StoredCheckpoint.from_bytes(json.dumps(document).encode(), tmp_path / "manifest")
    assert type(caught.value).__name__ in ("CorruptError", "SchemaVersionError")
    with pytest.raises(CorruptError):
        StoredCheckpoint.from_bytes(b"{", tmp_path / "manifest")
