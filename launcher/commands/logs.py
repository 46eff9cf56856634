"""``launcher logs``: print or follow what an attempt printed."""

from __future__ import annotations

import codecs
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator

import click

from launcher.backends import Backend
from launcher.commands.options import Place, output_option, place_options
from launcher.errors import BackendError, ExitCode, NotFoundError
from launcher.lifecycle import run_status
from launcher.output import note, printable
from launcher.progress import Changes
from launcher.rundir_errors import run_dir_errors
from launcher.site import Site
from launcher.states import State

_POLL_S = 0.5
# Colours and styles: harmless, but worth nothing once other sequences are escaped around them.
_STYLE = re.compile(r"\x1b\[[0-9;:]*m")
_LINE_END = re.compile(r"\r\n|\n|\r")
_LONGEST_LINE = 2**16


@click.command("logs")
@click.argument("run")
@click.option(
    "--attempt", type=click.IntRange(min=1), metavar="N", help="Which attempt; by default the latest."
)
@click.option("-f", "--follow", is_flag=True, help="Go on until the run has ended, through retries.")
@place_options
@output_option
def command(run: str, attempt: int | None, follow: bool, place: Place, output_format: str) -> int:
    """Print the log of the latest attempt of RUN, or of attempt N.

    Into a file or a pipe the bytes go unchanged; on a terminal control characters are made visible.
    --output json prints one object a line: {"attempt": 1, "line": "..."}.
    """
    site = place.open()
    backend = site.backend
    status = run_status(site, run)
    with run_dir_errors():
        attempts = list(backend.attempts(run))
        if attempt is not None and attempt not in attempts and not (follow and not status.settled):
            raise NotFoundError(
                f"run '{run}' has no log of attempt {attempt}",
                why=f"there are {', '.join(map(str, attempts))}" if attempts else "no attempt has started",
                next_step=site.suggest("status", run),
            )
        if not attempts and not follow:
            note(f"no attempt of {run} has a log yet: {status.state} ({status.reason})")
            if site.local:
                note(f"what its supervisor says: {status.run_dir}/local/supervisor.log")
            return int(ExitCode.OK)
        if follow:
            pieces = _followed(site, run, attempt)
        else:
            number = attempt if attempt is not None else attempts[-1]
            pieces = ((number, piece) for piece in _whole(backend, run, number))
        try:
            _print(pieces, output_format)
        except BrokenPipeError:  # `launcher logs RUN | head`: whoever read it has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt:
            note(f"stopped reading; run {run} is not affected")
            return int(ExitCode.INTERRUPTED)
    return int(ExitCode.OK)


def _whole(backend: Backend, run: str, attempt: int, offset_bytes: int = 0) -> Iterator[bytes]:
    while piece := backend.read_log(run, attempt, offset_bytes):
        offset_bytes += len(piece)
        yield piece


def _followed(site: Site, run: str, only: int | None) -> Iterator[tuple[int, bytes]]:
    """Pieces of the latest attempt's log and of those that follow it; an empty piece where it waits.

    Whether the run goes on is asked before the log is read, so that what it wrote last is not missed.
    """
    current, offset_bytes = only, 0
    cut_off = False
    waiting = Changes()
    while True:
        status = run_status(site, run)
        try:
            attempts = list(site.backend.attempts(run))
            if current is None and attempts:
                current = attempts[-1]
            if current is not None:
                for piece in _whole(site.backend, run, current, offset_bytes):
                    offset_bytes += len(piece)
                    yield current, piece
        except BackendError as error:
            if site.local:
                raise
            if not cut_off:  # told once; it goes on where it stopped
                note(f"-- cut off: {error}; trying again --")
            cut_off = True
            time.sleep(_POLL_S)
            continue
        cut_off = False
        later = [number for number in attempts if current is not None and number > current]
        if later:
            if only is not None:
                return
            current, offset_bytes = later[0], 0
            continue
        if status.settled:
            if current is None:
                note(f"no attempt of {run} has a log: {status.state} ({status.reason})")
            return
        if current is None or status.state is not State.RUNNING:  # why nothing comes
            waiting.show(status)
        if current is not None:
            yield current, b""
        time.sleep(_POLL_S)


def _print(pieces: Iterator[tuple[int, bytes]], output_format: str) -> None:
    writer = _writer(output_format)
    current: int | None = None
    for attempt, piece in pieces:
        if current is not None and attempt != current:
            writer(current, None)
            note(f"-- attempt {attempt} --")
        current = attempt
        writer(attempt, piece)
    if current is not None:
        writer(current, None)


def _writer(output_format: str) -> Callable[[int, bytes | None], None]:
    """Takes pieces of a log in order; None ends an attempt's log."""
    out = sys.stdout
    if output_format == "json":

        def as_json(attempt: int, line: str) -> None:
            out.write(json.dumps({"attempt": attempt, "line": line}) + "\n")
            out.flush()

        return _Lines(as_json)
    if out.isatty():

        def as_text(attempt: int, line: str) -> None:
            out.write(printable(_STYLE.sub("", line)) + "\n")
            out.flush()

        return _Lines(as_text)

    def raw(attempt: int, piece: bytes | None) -> None:
        if piece is not None:
            out.buffer.write(piece)
            out.buffer.flush()

    return raw


class _Lines:
    """Cuts a stream of bytes into lines; a bare carriage return (a progress bar) ends one too."""

    def __init__(self, write: Callable[[int, str], None]) -> None:
        self._write = write
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def __call__(self, attempt: int, piece: bytes | None) -> None:
        self._rest += self._decoder.decode(piece or b"", final=piece is None)
        # A carriage return at the end may be the first half of a line end.
        complete = self._rest if piece is None else self._rest.removesuffix("\r")
        held_back = self._rest[len(complete) :]
        *lines, last = _LINE_END.split(complete)
        if last and (piece is None or len(last) > _LONGEST_LINE):
            lines.append(last)
            last = ""
        for line in lines:
            self._write(attempt, line)
        self._rest = last + held_back
        if piece is None:
            self._decoder.reset()
