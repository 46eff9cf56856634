"""The launcher's exit codes and the errors that carry them.

::

    LauncherError            1   a bug or something unforeseen
     +-- UsageError          2   a flag, a name or a value on the command line
     +-- SpecError           3   a preset, an overlay, an override or a template
     +-- ConflictError       4   another run has this name
     +-- BackendError        5   the place where runs execute cannot be reached or refuses
     +-- IncompleteError     6   collected, but something is missing or corrupt
     +-- NotFoundError     102   no run of this name

Every error says what happened, why, and what to do next; ``cli.main`` prints the three and exits
with the class's code. Nothing else in the launcher calls ``sys.exit``.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The one table of the launcher's exit codes (README.md documents it)."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    SPEC = 3
    CONFLICT = 4
    BACKEND = 5
    INCOMPLETE = 6
    RUN_FAILED = 100  # status --wait, submit --follow
    RUN_UNFINISHED = 101
    RUN_NOT_FOUND = 102
    RUN_CANCELLED = 103
    INTERRUPTED = 130  # Ctrl-C, as a shell reports SIGINT


def exit_codes_line() -> str:
    """All codes in words, as a command's help shows them that has no shorter line of its own."""
    words = {
        ExitCode.OK: "done",
        ExitCode.INTERNAL: "internal error",
        ExitCode.USAGE: "usage",
        ExitCode.SPEC: "invalid preset or spec",
        ExitCode.CONFLICT: "another run has this name",
        ExitCode.BACKEND: "backend out of reach",
        ExitCode.INCOMPLETE: "incomplete or corrupt",
        ExitCode.RUN_FAILED: "run failed",
        ExitCode.RUN_UNFINISHED: "not finished",
        ExitCode.RUN_NOT_FOUND: "no such run",
        ExitCode.RUN_CANCELLED: "cancelled",
        ExitCode.INTERRUPTED: "interrupted",
    }
    return "Exit codes: " + ", ".join(f"{int(code)} {words[code]}" for code in ExitCode) + "."


class LauncherError(Exception):
    """An error with a place, a reason and a next step.

    Args:
        what: what happened, naming the place (a flag, ``file:line: path.to.field``, a run, a file).
        why: the reason, where it is not obvious from ``what``.
        next_step: what the user can do now, preferably a command.
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, what: str, *, why: str | None = None, next_step: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.next_step = next_step

    def as_dict(self) -> dict[str, str | int | None]:
        """The error as ``--output json`` prints it."""
        return {
            "error": type(self).__name__,
            "exit_code": int(self.exit_code),
            "what": self.what,
            "why": self.why,
            "next_step": self.next_step,
        }


class UsageError(LauncherError):
    exit_code = ExitCode.USAGE


class SpecError(LauncherError):
    exit_code = ExitCode.SPEC


class ConflictError(LauncherError):
    exit_code = ExitCode.CONFLICT


class BackendError(LauncherError):
    exit_code = ExitCode.BACKEND


class IncompleteError(LauncherError):
    exit_code = ExitCode.INCOMPLETE


class NotFoundError(LauncherError):
    exit_code = ExitCode.RUN_NOT_FOUND
