"""The trainer's own metrics: ``metrics/attempt-0001.jsonl``, a line a step."""

from __future__ import annotations

import json
from typing import Any

from influence.rundir.errors import CorruptError
from influence.rundir.files import read_inside
from influence.rundir.paths import RunPaths

_MAX_BYTES = 2**30


def read_metrics(paths: RunPaths, attempt: int) -> dict[int, dict[str, Any]]:
    """What an attempt logged, by step; several lines of one step add up, the later value of a name counts.

    The file is written while it is read: a last line that is cut short is left out.

    Returns:
        Step to ``{name: value}``; empty where the attempt has logged nothing.

    Raises:
        CorruptError: a line before the last is not ``{"step": ..., "data": {...}}``; names file and line.
        StorageError: the file cannot be read.
    """
    path = paths.metrics(attempt)
    try:
        lines = read_inside(paths.root_dir, path, max_bytes=_MAX_BYTES).split(b"\n")
    except FileNotFoundError:
        return {}
    num_lines = len(lines)
    while num_lines and not lines[num_lines - 1].strip():
        num_lines -= 1
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines[:num_lines], 1):
        try:
            entry = json.loads(line)
            step, data = int(entry["step"]), dict(entry["data"])
        except (ValueError, TypeError, LookupError, RecursionError):
            if number == num_lines:
                break
            raise CorruptError(path, f'line {number} is not {{"step": ..., "data": {{...}}}}') from None
        by_step.setdefault(step, {}).update(data)
    return by_step
