"""Which checkpoint verl resumes from, and which attempt wrote it. Standard library only.

verl writes a checkpoint's files in place and last a tracker file that names the newest one, neither of them
atomically. So a checkpoint counts only if it was finished, and the tracker is set right before verl reads it.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from influence.rundir import CorruptError, StorageError, read_json, write_atomic, write_json

_TRACKER = "latest_checkpointed_iteration.txt"
_FOLDER = re.compile(r"global_step_([1-9][0-9]*)")
_MARKER = "influence.json"
# verl writes it after the workers' shards: the last file of a checkpoint.
_LAST_FILE = "data.pt"


def begin_checkpoint(checkpoints_dir: Path, step: int, attempt: int) -> None:
    """Before verl saves: take away what an earlier attempt left there, and say whose this one is."""
    folder = checkpoints_dir / f"global_step_{step}"
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    except OSError as error:
        raise StorageError.from_os_error(error, folder, "making room for a checkpoint") from None
    write_json(folder / _MARKER, {"attempt": attempt, "step": step})


def checkpoint_attempt(checkpoints_dir: Path, step: int) -> int | None:
    """The attempt that wrote a checkpoint; None where nothing says so."""
    try:
        return int(read_json(checkpoints_dir / f"global_step_{step}" / _MARKER)["attempt"])
    except (FileNotFoundError, CorruptError, LookupError, TypeError, ValueError):
        return None


def newest_checkpoint(checkpoints_dir: Path) -> tuple[int, Path] | None:
    """The step and folder of the newest checkpoint that verl has finished; None where there is none.

    Raises:
        StorageError: the tracker cannot be read.
    """
    step = _tracked_step(checkpoints_dir / _TRACKER)
    folder = checkpoints_dir / f"global_step_{step}"
    return (step, folder) if step and (folder / _LAST_FILE).is_file() else None


def settle_tracker(checkpoints_dir: Path, first_missing_step: int) -> int:
    """Point verl's tracker at the newest finished checkpoint before the first missing step.

    From a later one the missing step would never be computed. Without any, the tracker goes, and verl starts
    from scratch. Checkpoints are left alone.

    Returns:
        The step to resume from; 0: from scratch.

    Raises:
        StorageError: the tracker cannot be written.
    """
    tracker = checkpoints_dir / _TRACKER
    tracked = _tracked_step(tracker)
    usable = [step for step in _finished_steps(checkpoints_dir, tracked) if step < first_missing_step]
    chosen = max(usable, default=0)
    if chosen == (tracked or 0):
        return chosen
    if chosen == 0:
        try:
            tracker.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError.from_os_error(error, tracker, "removing") from None
    else:
        write_atomic(tracker, str(chosen).encode())
    return chosen


def _tracked_step(tracker: Path) -> int | None:
    """What the tracker says; None where it is not there or torn."""
    try:
        return int(tracker.read_text())
    except (FileNotFoundError, ValueError):
        return None
    except OSError as error:
        raise StorageError.from_os_error(error, tracker, "reading") from None


def _finished_steps(checkpoints_dir: Path, tracked: int | None) -> list[int]:
    """Checkpoints that were written to the end.

    The tracker is written after a checkpoint's last file. So all up to the tracked one are finished; without
    a readable tracker it was being written just then, and whatever has the last file is.
    """
    try:
        folders = [
            (match, path) for path in checkpoints_dir.iterdir() if (match := _FOLDER.fullmatch(path.name))
        ]
    except FileNotFoundError:
        return []
    steps = [int(match[1]) for match, path in folders if (path / _LAST_FILE).is_file()]
    return [step for step in steps if tracked is None or step <= tracked]
