"""A trainer's way to say no: an exit code and one line."""

from __future__ import annotations

from influence.rundir import (
    ConflictError,
    CorruptError,
    FencedError,
    NotARunError,
    RunDirError,
    RunNameError,
    SchemaVersionError,
    StorageError,
    TrainerExit,
)
from influence.store.errors import StoreConfigError, StoreError, StoreOutageError

FAILED = 1
"""Worth a retry that is charged."""


class Refusal(Exception):  # noqa: N818  (a decision, not a mishap)
    """Why the trainer does not go on.

    Args:
        code: what it exits with; says whether a retry makes sense.
        reason: one line for a person, with the place and the next step.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


_CODES: dict[type[RunDirError], int] = {
    RunNameError: TrainerExit.USAGE,
    NotARunError: TrainerExit.DATA,
    SchemaVersionError: TrainerExit.DATA,
    CorruptError: TrainerExit.DATA,
    ConflictError: TrainerExit.CONFIG,
    FencedError: TrainerExit.RETRY,
    StorageError: FAILED,
    StoreConfigError: TrainerExit.CONFIG,
    StoreError: FAILED,
}


def refusal_of(error: RunDirError) -> Refusal:
    """What an error of the run directory means for the attempt."""
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), FAILED)
    # A store that answered before is away for reasons of its own. One that never did may be named wrongly:
    # those starts are charged, so that they come to an end.
    if isinstance(error, StoreOutageError) and error.was_reached:
        code = TrainerExit.RETRY
    lines = [str(error), *(error.difference if isinstance(error, ConflictError) else [])]
    return Refusal(code, "\n  ".join(" ".join(line.split()) for line in lines))
