"""One attempt as its supervisor sees it: a child process in a session of its own, with an exit code."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from influence.rundir import RunDirError, RunPaths
from influence.rundir.attempts import read_attempt
from launcher.backends.processes import ProcessId, die_with_parent, reap

MARKER = "INFL_RUN_DIR"
"""The environment variable by which every process of a run is found, also without its supervisor."""


def marker(paths: RunPaths) -> tuple[str, str]:
    """Name and value that the processes of this run carry."""
    return MARKER, str(paths.root_dir.resolve())


_MOST_WORDS_BYTES = 2**16
_LONGEST_WORDS = 300
# A line of the supervisor itself begins with the time.
_OWN_LINE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T")


@dataclass(slots=True)
class AttemptProcess:
    """The trainer's first process; start it with :meth:`start`."""

    process: ProcessId
    highest_before: int
    """The highest attempt number claimed before the start, 0 if there was none."""
    words_from_bytes: int = 0
    """Where in the supervisor's log its standard error begins."""
    exit_code: int | None = None
    """Set once it has ended; negative: killed by that signal."""
    _child: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @classmethod
    def start(cls, paths: RunPaths, command: Sequence[str], environment: Mapping[str, str]) -> AttemptProcess:
        """Start an attempt in a session of its own.

        What it prints is in its own log; here only its standard error is kept, in the supervisor's log, for
        an end that comes before it has a log.

        Args:
            command: the program and its arguments; no shell is involved.
            environment: its environment, to which the run's marker is added.

        Raises:
            OSError: the program cannot be started.
        """
        highest_before = max(paths.attempt_numbers(), default=0)
        words_from_bytes = _size_bytes(paths.supervisor_log)
        child = subprocess.Popen(  # noqa: S603  the command is the trainer's, as a list
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=paths.root_dir,
            env={**environment, **dict([marker(paths)])},
            start_new_session=True,
            # When the supervisor is killed, the attempt ends as if it were preempted.
            preexec_fn=die_with_parent(signal.SIGTERM),
        )
        # A child that ended at once is a zombie without a start token worth having: any will do,
        # since its number cannot be reused before it is reaped.
        process = ProcessId.of(child.pid) or ProcessId(child.pid, "ended")
        return cls(process, highest_before, words_from_bytes, _child=child)

    def poll(self) -> int | None:
        """Reap whatever has ended, this attempt or orphans that it left, and return its exit code."""
        ended = reap()
        if self.process.pid in ended and self.exit_code is None:
            self.exit_code = ended[self.process.pid]
            if self._child is not None:
                self._child.returncode = self.exit_code  # reaped here, so Popen must not wait for it
        return self.exit_code

    def number(self, paths: RunPaths) -> int | None:
        """The attempt number that this process claimed; None if it claimed none (yet).

        A trainer that finds all steps committed, or refuses its arguments, claims none.
        """
        claimed = [number for number in paths.attempt_numbers() if number > self.highest_before]
        own = [number for number in claimed if self._claimed(paths, number)]
        return max(own or claimed, default=None)

    def _claimed(self, paths: RunPaths, number: int) -> bool:
        try:
            record = read_attempt(paths, number)
        except RunDirError:  # torn by a dying disk; its number is all that is known
            return False
        return record.pid == self.process.pid and record.host == os.uname().nodename

    def last_words(self, paths: RunPaths) -> str:
        """What the trainer said about its end: in its record, or to standard error before it had one."""
        number = self.number(paths)
        if number is not None:
            try:
                return _clipped(read_attempt(paths, number).reason or "")
            except RunDirError:
                return ""
        try:
            with paths.supervisor_log.open("rb") as stream:
                stream.seek(self.words_from_bytes)
                text = stream.read(_MOST_WORDS_BYTES).decode("utf-8", "replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip() and not _OWN_LINE.match(line)]
        errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
        return _clipped((errors or lines[-1:] or [""])[0])


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _clipped(text: str) -> str:
    return text if len(text) <= _LONGEST_WORDS else text[: _LONGEST_WORDS - 3] + "..."


def trainer_command(executable: str, run_dir: Path) -> list[str]:
    """The command of every attempt of a real run."""
    return [executable, "-m", "influence.train", "--run-dir", str(run_dir)]
