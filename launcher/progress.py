"""Live progress of a run: a bar on a terminal, a line a change anywhere else. Written to standard error."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol

from influence.rundir.errors import RunDirError
from launcher.errors import BackendError
from launcher.output import note, one_line, stderr_is_terminal
from launcher.states import RunStatus

if TYPE_CHECKING:
    from rich.live import Live
    from rich.progress import Progress

POLL_S = 1.0
# Counts, ages and a back-off's seconds go on within one reason; a new number alone is no news.
_NUMBER = re.compile(r"\d+(?:[.:]\d+)*")
# Ray colours the names of its actors; one line of a log needs no colour, and escaped it would be unreadable.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Display(Protocol):
    """Shows what changed."""

    def show(self, status: RunStatus, log_line: Callable[[RunStatus], str]) -> None: ...


def follow(
    poll: Callable[[], RunStatus],
    log_line: Callable[[RunStatus], str] = lambda _: "",
    *,
    poll_s: float = POLL_S,
    timeout_s: float | None = None,
) -> RunStatus:
    """Show a run until only a person can change its state.

    Args:
        poll: the run's status now.
        log_line: the last line of its log now; only a terminal shows it.
        poll_s: seconds between two polls.
        timeout_s: stop looking after that many seconds.

    Returns:
        The last status seen.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with _display() as display:
        while True:
            status = poll()
            display.show(status, log_line)
            if status.settled or (deadline is not None and time.monotonic() >= deadline):
                return status
            wait_s = poll_s if deadline is None else min(poll_s, deadline - time.monotonic())
            time.sleep(max(0.0, wait_s))


class LastLogLine:
    """Finds the last line of a run's log, reading only what is new; while nobody answers, the last one known.

    Args:
        read: the backend's ``read_log``.
    """

    def __init__(self, read: Callable[[str, int, int], bytes]) -> None:
        self._read = read
        self._attempt: int | None = None
        self._offset_bytes = 0
        self._line = ""

    def __call__(self, status: RunStatus) -> str:
        if status.attempt is None:
            return ""
        if status.attempt != self._attempt:
            self._attempt, self._offset_bytes, self._line = status.attempt, 0, ""
        with suppress(BackendError, RunDirError):
            while piece := self._read(status.run, status.attempt, self._offset_bytes):
                self._offset_bytes += len(piece)
                for line in reversed(piece.decode("utf-8", "replace").splitlines()):
                    if (bare := _COLOUR.sub("", line)).strip():
                        self._line = bare
                        break
        return self._line


@contextmanager
def live_lines() -> Iterator[Callable[[list[str]], None]]:
    """Show lines that replace those before: in place on a terminal, printed when they differ elsewhere."""
    if not stderr_is_terminal():
        shown: list[str] = []

        def print_new(lines: list[str]) -> None:
            for line in lines:
                if line not in shown:
                    note(line)
            shown[:] = lines

        yield print_new
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(stderr=True), transient=True) as live:
        yield lambda lines: live.update(Text("\n".join(lines)), refresh=True)


@contextmanager
def _display() -> Iterator[Display]:
    if not stderr_is_terminal():
        yield _Lines()
        return
    from rich.console import Console
    from rich.live import Live
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    progress = Progress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=20),
        MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn(),
    )  # fmt: skip
    with Live(console=Console(stderr=True), transient=True, refresh_per_second=4) as live:
        yield _Bar(progress, live)


class _Bar:
    """A bar, the last line of the log below it, and what changed above it."""

    def __init__(self, progress: Progress, live: Live) -> None:
        self._progress = progress
        self._live = live
        self._task = progress.add_task("", total=None)
        self._changes = _Lines(lambda line: live.console.print(line, markup=False, highlight=False))

    def show(self, status: RunStatus, log_line: Callable[[RunStatus], str]) -> None:
        from rich.console import Group
        from rich.text import Text

        self._changes.show(status, log_line)
        attempt = f", attempt {status.attempt}" if status.attempt else ""
        self._progress.update(
            self._task,
            description=f"{status.state}{attempt}",
            completed=status.steps_committed or 0,
            total=status.total_steps,
        )
        # As text: no markup in a log is obeyed.
        last = Text(one_line(log_line(status).strip()), style="dim", no_wrap=True, overflow="ellipsis")
        self._live.update(Group(self._progress, last))


class _Lines:
    """One line whenever the state, the attempt or the number of steps changes, or the reason for the state,
    and what a person can do about it below.

    Reasons can alternate for hours (a pull that fails, and its back-off): within one state each is told once.
    """

    def __init__(self, write: Callable[[str], None] = note) -> None:
        self._write = write
        self._shown: tuple[object, ...] | None = None
        self._reasons: set[str] = set()
        self._advice: str | None = None

    def show(self, status: RunStatus, log_line: Callable[[RunStatus], str]) -> None:
        now = (status.state, status.attempt, status.steps_committed, status.total_steps)
        if now != self._shown:
            self._shown = now
            self._reasons.clear()
            self._advice = None
        reason = _NUMBER.sub("#", status.reason)
        if reason not in self._reasons:
            self._reasons.add(reason)
            self._write(one_line(f"{time.strftime('%H:%M:%S')} {status.run} {progress_line(status)}"))
        # The end comes with its own next step, in the result.
        advice = None if status.settled else status.advice
        if advice is not None and advice != self._advice:
            self._write(one_line(f"{'':8} next: {advice}"))
        self._advice = advice or self._advice


def progress_line(status: RunStatus) -> str:
    """State, progress and reason: ``RUNNING  steps 1/2, attempt 1, last step 4 s ago: the trainer runs``."""
    return f"{status.state}  {', '.join(progress_parts(status))}: {status.reason}"


def progress_parts(status: RunStatus) -> list[str]:
    """What the trainer has committed, in words; empty parts are left out."""
    parts = []
    if status.total_steps is not None:
        parts.append(f"steps {status.steps_committed}/{status.total_steps}")
    if status.attempt is not None:
        parts.append(f"attempt {status.attempt}")
    if status.charged_retries:
        parts.append(f"retry {status.charged_retries} of {status.backoff_limit}")
    if status.last_step_age_s is not None:
        parts.append(f"last step {age(status.last_step_age_s)} ago")
    return parts or ["no progress known"]


def age(seconds: float) -> str:
    """A length of time in the unit that a person would choose: ``4 s``, ``12 min``, ``3.5 h``, ``2 d``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.0f} d"


def wandb_line(status: RunStatus) -> str | None:
    """The link, or where the offline run will get one; None when W&B is off."""
    if status.wandb_mode in (None, "disabled"):
        return None
    if status.wandb_mode == "offline":
        suffix = f", {status.wandb_url} after `wandb sync`" if status.wandb_url else ""
        return f"offline run {status.run}{suffix}"
    return f"{status.wandb_url} (unverified)" if status.wandb_url else f"online run {status.run}"
