"""The trainer's exit codes, and what whoever restarts it does with each.

The local supervisor, a Job's ``podFailurePolicy`` and the messages of ``status`` all read this one table.
"""

from __future__ import annotations

import signal
from enum import Enum, IntEnum


class TrainerExit(IntEnum):
    """What ``python -m influence.train`` exits with; the numbers are those of BSD's sysexits."""

    OK = 0
    """Every requested step is committed."""
    USAGE = 64
    """Wrong command line: not worth a retry."""
    DATA = 65
    """Data or a run directory that cannot be used: not worth a retry."""
    RETRY = 75
    """Stopped for a reason outside the run (SIGTERM, a later attempt): retry without charge."""
    CONFIG = 78
    """A configuration that cannot work: not worth a retry."""


class Verdict(Enum):
    """What follows from the way an attempt ended."""

    DONE = "done"
    FATAL = "fatal"
    """Fails the run at once."""
    FREE_RETRY = "free_retry"
    """Starts another attempt and does not count against the backoff limit."""
    CHARGED_RETRY = "charged_retry"
    """Starts another attempt and counts against the backoff limit."""


_FATAL = {TrainerExit.USAGE, TrainerExit.DATA, TrainerExit.CONFIG}
# A SIGTERM that came before the trainer could trap it is still a request from outside, not a failure.
_FREE = {TrainerExit.RETRY, 128 + signal.SIGTERM}

_WORDS: dict[int, str] = {
    TrainerExit.OK: "all steps committed",
    TrainerExit.USAGE: "usage error",
    TrainerExit.DATA: "data error",
    TrainerExit.RETRY: "asked to be started again",
    TrainerExit.CONFIG: "configuration error",
}
_SIGNAL_HINTS = {
    signal.SIGKILL: ", out of memory or killed from outside",
    signal.SIGTERM: ", asked to stop",
    signal.SIGINT: ", interrupted",
}


def _as_shell(code: int) -> int:
    """``-signal`` (subprocess) as ``128 + signal`` (shells, containers)."""
    if not -64 <= code <= 255:
        raise ValueError(f"exit code {code} is outside of -64..255")
    return 128 - code if code < 0 else code


def classify(code: int) -> Verdict:
    """What to do after the trainer exited.

    Args:
        code: 0..255 as a shell or a container reports it, or ``-signal`` as ``subprocess`` does.
    """
    code = _as_shell(code)
    if code == TrainerExit.OK:
        return Verdict.DONE
    if code in _FATAL:
        return Verdict.FATAL
    return Verdict.FREE_RETRY if code in _FREE else Verdict.CHARGED_RETRY


def describe(code: int) -> str:
    """An exit code in words, e.g. ``configuration error (78)`` or ``killed by SIGSEGV (139)``."""
    code = _as_shell(code)
    if code > 128:
        try:
            killer = signal.Signals(code - 128)
        except ValueError:
            return f"failed (exit code {code})"
        return f"killed by {killer.name} ({code}){_SIGNAL_HINTS.get(killer, '')}"
    if words := _WORDS.get(code):
        return f"{words} ({code})"
    return f"failed (exit code {code})"
