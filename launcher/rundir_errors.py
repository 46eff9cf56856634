"""Errors of the run directory as the launcher's own, which have exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from influence import rundir
from influence.rundir import RunDirError
from launcher.errors import (
    BackendError,
    ConflictError,
    IncompleteError,
    LauncherError,
    NotFoundError,
    SpecError,
    UsageError,
)

_KINDS: tuple[tuple[type[RunDirError], type[LauncherError]], ...] = (
    (rundir.RunNameError, UsageError),
    (rundir.NotARunError, NotFoundError),
    (rundir.SchemaVersionError, SpecError),
    (rundir.ConflictError, ConflictError),
    (rundir.StorageError, BackendError),
    (rundir.CorruptError, IncompleteError),
)


@contextmanager
def run_dir_errors() -> Iterator[None]:
    """Raise what a run directory raises as the launcher's errors."""
    try:
        yield
    except RunDirError as error:
        kind = next((ours for theirs, ours in _KINDS if isinstance(error, theirs)), LauncherError)
        raise kind(in_words(error), next_step=error.next_step) from error
    except OSError as error:
        if error.filename is None:  # a pipe, or the current directory: not the run's
            raise
        raise BackendError(
            f"{error.filename}: {error.strerror}", next_step="check the permissions and the filesystem"
        ) from error


def in_words(error: RunDirError) -> str:
    """Place and reason, without the next step."""
    place = "" if error.path is None else f"{error.path}: "
    return f"{place}{error.reason}"
