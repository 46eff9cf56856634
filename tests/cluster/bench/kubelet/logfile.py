"""A container's log, as the container runtime interface has it: ``TIME stdout F|P TEXT``, a line each."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.cluster.bench.kubelet import times

_MAX_PIECE_BYTES = 16_384  # a longer line is kept in pieces, as container runtimes do
_FOLLOW_EVERY_S = 0.05


class LogWriter(threading.Thread):
    """Copies what a process prints into its log until the last writer has closed the pipe."""

    def __init__(self, pipe: IO[bytes], path: Path) -> None:
        super().__init__(daemon=True)
        self._pipe = pipe
        self._path = path
        self.start()

    def run(self) -> None:
        with self._path.open("ab", buffering=0) as file, self._pipe:
            while piece := self._pipe.readline(_MAX_PIECE_BYTES):
                tag = b"F" if piece.endswith(b"\n") else b"P"
                file.write(
                    times.nanoseconds().encode() + b" stdout " + tag + b" " + piece.rstrip(b"\n") + b"\n"
                )


@dataclass(frozen=True, slots=True)
class LogOptions:
    """The query of ``/containerLogs``."""

    follow: bool = False
    timestamps: bool = False
    tail_lines: int | None = None
    limit_bytes: int | None = None
    since: float | None = None
    """Seconds since the epoch."""

    @classmethod
    def of(cls, query: Mapping[str, str]) -> LogOptions:
        def number(name: str) -> int | None:
            return int(query[name]) if name in query else None

        since = times.parse(query["sinceTime"]) if "sinceTime" in query else None
        if "sinceSeconds" in query:
            since = time.time() - int(query["sinceSeconds"])
        return cls(
            follow=query.get("follow") == "true",
            timestamps=query.get("timestamps") == "true",
            tail_lines=number("tailLines"),
            limit_bytes=number("limitBytes"),
            since=since,
        )


def read(path: Path, options: LogOptions, ended: threading.Event) -> Iterator[bytes]:
    """What the options ask for, in pieces; with ``follow`` until the container has ended and all is said."""
    position = 0
    left = options.limit_bytes
    first = True
    while True:
        over = ended.is_set()  # before reading: what is written until then is read below
        lines, position = _complete_lines(path, position)
        if options.since is not None:
            lines = [line for line in lines if times.parse(line[:30].decode()) >= options.since]
        if first and options.tail_lines is not None:
            lines = _last_lines(lines, options.tail_lines)
        first = False
        text = b"".join(_shown(line, options.timestamps) for line in lines)
        if left is not None:
            text = text[:left]
            left -= len(text)
        if text:
            yield text
        if left == 0 or not options.follow or (over and not lines):
            return
        if not lines:
            time.sleep(_FOLLOW_EVERY_S)


def tail(path: Path, num_lines: int, num_bytes: int) -> str:
    """The last words, for a termination message."""
    lines, _ = _complete_lines(path, 0)
    text = b"".join(_shown(line, timestamps=False) for line in lines[-num_lines:])
    return text[-num_bytes:].decode(errors="replace")


def _complete_lines(path: Path, position: int) -> tuple[list[bytes], int]:
    if not path.exists():
        return [], position
    with path.open("rb") as file:
        file.seek(position)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return whole.splitlines(keepends=True), position + len(whole)


def _last_lines(lines: list[bytes], count: int) -> list[bytes]:
    """``count`` lines as a reader counts them: the pieces of a long one belong together."""
    start = len(lines)
    while start > 0 and count > 0:
        start -= 1
        while start > 0 and _is_piece(lines[start - 1]):
            start -= 1
        count -= 1
    return lines[start:]


def _is_piece(line: bytes) -> bool:
    return line.split(b" ", 3)[2] == b"P"


def _shown(line: bytes, timestamps: bool) -> bytes:
    moment, _, tag, text = line.split(b" ", 3)
    if tag == b"P":
        text = text.removesuffix(b"\n")
    return moment + b" " + text if timestamps else text
