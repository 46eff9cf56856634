"""Logs of attempts in a run directory that this machine can read."""

from __future__ import annotations

from collections.abc import Sequence

from influence.rundir import RunPaths, StorageError
from influence.rundir.files import open_inside

_PIECE_BYTES = 2**18


def claimed(paths: RunPaths) -> bool:
    """Whether any attempt has claimed a number there: numbers mean the trainer's own from then on."""
    return bool(paths.attempt_numbers())


def logged_attempts(paths: RunPaths) -> Sequence[int]:
    """The attempts that have a log there, in increasing order."""
    return [number for number in paths.attempt_numbers() if paths.log(number).is_file()]


def read_log_file(paths: RunPaths, attempt: int, offset_bytes: int) -> bytes:
    """The next piece of an attempt's log; empty where there is no more by now.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        with open_inside(paths.root_dir, paths.log(attempt)) as stream:
            stream.seek(offset_bytes)
            return stream.read(_PIECE_BYTES)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise StorageError.from_os_error(error, paths.log(attempt), "reading") from None
