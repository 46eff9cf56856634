"""An attempt's log: everything that it prints, in the run directory and on our own standard output.

Where our standard output is not what a container's log holds, as below Ray's job server, ``INFL_CONSOLE``
names a file that is (``/proc/1/fd/1``) and gets everything too.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

CONSOLE = "INFL_CONSOLE"


class AttemptLog:
    """Writes to all places; a full disk or a closed terminal stops one of them, never the run.

    Args:
        path: the file in the run directory.
        console: one more file to write to, if it can be opened.
    """

    def __init__(self, path: Path, console: str | None = None) -> None:
        self._path = path
        self._file: int | None = None
        self._console: int | None = None
        if console:
            with suppress(OSError):
                self._console = os.open(console, os.O_WRONLY | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC)
        self._has_terminal = sys.stdout is not None  # None: closed before we began
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            self._give_up_file(error)

    def write(self, data: bytes) -> None:
        """Bytes as they come, without a buffer: a killed trainer's last lines are there."""
        if self._file is not None:
            try:
                _write_all(self._file, data)
            except OSError as error:
                self._give_up_file(error)
        self._write_terminal(data)

    def line(self, text: str) -> None:
        """A line of the trainer's own."""
        self.write(f"{text}\n".encode())

    def close(self) -> None:
        """To the disk."""
        if self._file is not None:
            with suppress(OSError):
                os.fsync(self._file)
            with suppress(OSError):
                os.close(self._file)
            self._file = None
        self._close_console()

    def _close_console(self) -> None:
        if self._console is not None:
            with suppress(OSError):
                os.close(self._console)
            self._console = None

    def _give_up_file(self, error: OSError) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.close(self._file)
            self._file = None
        self._write_terminal(f"{self._path}: {error.strerror}; the log goes on here only\n".encode())

    def _write_terminal(self, data: bytes) -> None:
        if self._console is not None:
            try:
                _write_all(self._console, data)
            except OSError:
                self._close_console()
        if not self._has_terminal:
            return
        try:
            _write_all(sys.stdout.fileno(), data)
        except (OSError, ValueError):
            self._has_terminal = False


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
