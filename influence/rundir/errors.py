"""What can be wrong with a run directory.

::

    RunDirError
     +-- RunNameError        a name that no run can have
     +-- NotARunError        a directory without run.json
     +-- SchemaVersionError  written by another version of this software
     +-- CorruptError        a file that is not what it should be: torn, altered, foreign, a link
     +-- ConflictError       another run has this name
     +-- FencedError         a later attempt has taken over
     +-- StorageError        the filesystem refused: full, read-only, no permission, over quota

Every error names the place, the reason and the next step. Nothing here knows exit codes: the trainer and the
launcher each have their own table.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class RunDirError(Exception):
    """An error with a place, a reason and a next step.

    Args:
        path: the file or directory concerned; None where there is none yet.
        reason: what is wrong with it, in words.
        next_step: what a person can do now.
    """

    def __init__(self, path: str | os.PathLike[str] | None, reason: str, next_step: str) -> None:
        super().__init__(reason)
        self.path = None if path is None else Path(path)
        self.reason = reason
        self.next_step = next_step

    def __str__(self) -> str:
        place = "" if self.path is None else f"{self.path}: "
        return f"{place}{self.reason}; {self.next_step}"

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders (an actor raises, the driver reads); subclasses take other arguments.
        return _rebuild, (type(self), self.__dict__)


def _rebuild(cls: type[RunDirError], state: dict[str, Any]) -> RunDirError:
    error = cls.__new__(cls, state["reason"])
    error.__dict__.update(state)
    return error


class RunNameError(RunDirError):
    """Not a DNS label of the permitted length; the next step holds a valid suggestion."""


class NotARunError(RunDirError):
    """No ``run.json``: the directory is not a run, or not one yet."""


class SchemaVersionError(RunDirError):
    """Written under another version of the schema; the reason names both.

    Args:
        what: whose version, e.g. ``run.json has``.
    """

    def __init__(self, path: str | os.PathLike[str] | None, what: str, found: object, supported: int) -> None:
        super().__init__(
            path,
            f"{what} schema version {found!r}, this installation reads version {supported}",
            "use the version of influence-launcher that wrote the run",
        )
        self.found = found
        self.supported = supported


class CorruptError(RunDirError):
    """A file that cannot be what a run directory holds in its place. It is never used."""

    def __init__(
        self, path: str | os.PathLike[str] | None, reason: str, next_step: str | None = None
    ) -> None:
        super().__init__(path, reason, next_step or "restore it from a copy; as it is, it is never used")


class ConflictError(RunDirError):
    """``run.json`` is there with another spec; ``difference`` has a line for each value that differs."""

    def __init__(self, path: str | os.PathLike[str], difference: Sequence[str]) -> None:
        shown = ", ".join(difference[:3]) + (", ..." if len(difference) > 3 else "")
        super().__init__(
            path,
            f"another run has this name, and its settings differ: {shown}",
            "choose another name, or submit the same settings to adopt that run",
        )
        self.difference = list(difference)


class FencedError(RunDirError):
    """A higher attempt exists; this one must write nothing more.

    Args:
        attempt: the number of the attempt that is fenced.
        by: the highest attempt there is.
    """

    def __init__(self, path: str | os.PathLike[str], attempt: int, by: int) -> None:
        super().__init__(
            path,
            f"attempt {attempt} is fenced: attempt {by} has taken over",
            "stop this process; the later attempt goes on",
        )
        self.attempt = attempt
        self.by = by


class StorageError(RunDirError):
    """The filesystem refused an operation; ``errno`` is the system's number for the reason."""

    def __init__(
        self, path: str | os.PathLike[str] | None, reason: str, next_step: str, errno: int | None = None
    ) -> None:
        super().__init__(path, reason, next_step)
        self.errno = errno

    @classmethod
    def from_os_error(cls, error: OSError, path: str | os.PathLike[str], doing: str) -> StorageError:
        """Word an ``OSError`` met while ``doing`` something (``writing``, ``reading``) with ``path``."""
        reason, next_step = _STORAGE_REASONS.get(
            error.errno or 0,
            (
                (error.strerror or str(error)).lower(),
                "check the filesystem that holds it, then submit again: committed steps are kept",
            ),
        )
        return cls(path, f"{doing} failed: {reason}", next_step, error.errno)


_PERMISSION = ("permission denied", "check the owner and mode of the file and its directory (ls -ld)")
_STORAGE_REASONS = {
    errno.ENOSPC: (
        "no space left on the device",
        "free space there (df -h), then submit again: committed steps are kept",
    ),
    errno.EDQUOT: (
        "the disk quota is used up",
        "free space or raise the quota, then submit again: committed steps are kept",
    ),
    errno.EFBIG: ("the file would exceed the size limit", "raise the limit (ulimit -f), then submit again"),
    errno.EROFS: ("the filesystem is read-only", "mount it writable, or choose another root for the runs"),
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
}
