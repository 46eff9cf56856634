"""Names in a run directory that no run writes: files that somebody put or left there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from influence.rundir.files import list_dir
from influence.rundir.paths import ATTEMPT_DIGITS, STEP_DIGITS, RunPaths

_ATTEMPT = re.compile(rf"{ATTEMPT_DIGITS}\.json")
_LOG = re.compile(rf"attempt-{ATTEMPT_DIGITS}\.log")
_METRICS = re.compile(rf"attempt-{ATTEMPT_DIGITS}\.jsonl")
_STEP = re.compile(rf"step_{STEP_DIGITS}\.(npz|json)")
_REPLAYS = re.compile(rf"attempt-{ATTEMPT_DIGITS}")


def find_strays(paths: RunPaths, num_total_steps: int) -> Iterator[tuple[str, str]]:
    """``(file, reason)`` of each, in the folders that a collect reads.

    Unfinished temporary files are none, and neither is the score file of a commit that did not finish.

    Raises:
        CorruptError: a link or a file stands in a folder's place.
        StorageError: a folder cannot be listed.
    """
    folders = [
        (paths.attempts_dir, _ATTEMPT),
        (paths.logs_dir, _LOG),
        (paths.metrics_dir, _METRICS),
        (paths.steps_dir, _STEP),
        (paths.replays_dir, _REPLAYS),
        *((paths.replays_of(number), _STEP) for number in paths.replayed_step_numbers()),
    ]
    for folder, pattern in folders:
        for path in list_dir(folder):
            name = path.relative_to(paths.root_dir).as_posix()
            match = pattern.fullmatch(path.name)
            if match is None:
                if not (path.name.startswith(".") and path.suffix == ".tmp"):
                    # A file's name may hold bytes that are no text.
                    shown = os.fsencode(name).decode(errors="backslashreplace")
                    yield shown, "no file that a run has"
            elif pattern is _STEP and match[2] == "npz" and not 1 <= int(match[1]) <= num_total_steps:
                yield name, f"the run has {num_total_steps} steps"
