"""What commands print: plain lines for people, one JSON document with ``--output json``.

Results go to standard output, everything else (progress, warnings, errors) to standard error, so
that a pipe sees results only. ``rich`` is imported only where a terminal shows a progress bar.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import click

# Names and texts that come from files must not move the cursor, nor reverse the text around them.
_DIRECTION_MARKS = (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROL = {c: f"\\x{c:02x}" for c in [*range(0x20), *range(0x7F, 0xA0)] if c not in (0x09, 0x0A)} | {
    c: f"\\u{c:04x}" for c in _DIRECTION_MARKS
}


def printable(text: str) -> str:
    """``text`` with control characters and marks of direction escaped (tab and newline stay)."""
    return text.translate(_CONTROL)


def one_line(text: str) -> str:
    """``text`` as `printable` gives it, with newlines escaped too: a field cannot pose as further lines."""
    return printable(text).replace("\n", "\\n")


def emit(ctx_format: str, document: Any, plain: Callable[[], Sequence[str]]) -> None:
    """Print a command's result.

    Args:
        ctx_format: ``"text"`` or ``"json"``, the value of ``--output``.
        document: what ``--output json`` prints; anything ``json`` can serialise.
        plain: called for ``"text"`` only, returns the lines to print.
    """
    if ctx_format == "json":
        click.echo(json.dumps(document, indent=2, sort_keys=True, allow_nan=False))
        return
    for line in plain():
        click.echo(one_line(line))


def note(line: str) -> None:
    """A line beside the result: progress in words, a warning, a hint. Goes to standard error.

    Where standard error cannot be written, the work goes on, and the exit code still says how it ended.
    """
    with suppress(OSError):
        click.echo(one_line(line), err=True)


def stderr_is_terminal() -> bool:
    """Whether progress bars make sense."""
    return sys.stderr.isatty()


def terminal_width(*, err: bool = False) -> int | None:
    """The columns of the terminal that standard output (or error) is; None where it is none."""
    stream = sys.stderr if err else sys.stdout
    if stream is None or not stream.isatty():  # None: it was closed before we began
        return None
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"]) or None
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


def shortened(text: str, width: int) -> str:
    """``text``, or as much of it as fits into ``width`` columns with ``...`` at its end."""
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    width: int | None = None,
) -> list[str]:
    """Aligned columns as lines.

    Args:
        headers: one title a column.
        rows: cells as text, one sequence a row, each as long as ``headers``.
        right: indices of right-aligned columns.
        width: the columns of the terminal. The last cells are shortened to it, or stand below their rows
            where too little room is left beside them. None: everything stays whole.
    """
    if width is not None and rows:
        return _fitted(headers, [[one_line(cell) for cell in row] for row in rows], right, width)
    widths = [max(len(h), *(len(r[i]) for r in rows)) if rows else len(h) for i, h in enumerate(headers)]

    def line(cells: Sequence[str]) -> str:
        parts = [
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    return [line(headers), line(["-" * w for w in widths]), *(line(r) for r in rows)]


_LEAST_ROOM = 30


def _fitted(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int], width: int
) -> list[str]:
    used = sum(max(len(headers[i]), *(len(row[i]) for row in rows)) + 2 for i in range(len(headers) - 1))
    room = width - used
    longest = max(len(headers[-1]), *(len(row[-1]) for row in rows))
    if room >= min(longest, _LEAST_ROOM):
        return table(headers, [[*row[:-1], shortened(row[-1], room)] for row in rows], right=right)
    heading, rule, *lines = table(headers[:-1], [row[:-1] for row in rows], right=right)
    below = [f"  {shortened(row[-1], width - 2)}" for row in rows]
    pairs = zip(lines, below, strict=True)
    return [heading, rule, *(line for pair in pairs for line in pair if line.strip())]
