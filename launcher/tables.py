"""Tables of a report, and their two forms: aligned text for a terminal, and Markdown.

Cells come from files that other programs wrote, so a cell is one line of printable characters whatever
the file held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher import output

MAX_COLUMNS = 110


@dataclass(frozen=True, slots=True)
class Table:
    """A titled table, with lines of text below it.

    Attributes:
        headers: one a column, with the unit; empty headers make a list of names and values.
        right: indices of right-aligned columns.
        notes: sentences below the table.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    right: frozenset[int] = frozenset()
    notes: Sequence[str] = ()


def cell(value: object) -> str:
    """``value`` as one printable line: control, format and unassigned characters become escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value))


def size(num_bytes: int) -> str:
    """A size in words: ``29.1 MB``, or kB below a megabyte."""
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.1f} kB"


def as_text(tables: Sequence[Table]) -> list[str]:
    """Lines of at most `MAX_COLUMNS` characters, except where one word alone is longer (a link)."""
    lines: list[str] = []
    for table in tables:
        lines += ["", table.title]
        lines += [f"  {line}" for line in _text_table(table)]
        lines += [f"  {line}" for note in table.notes for line in wrap(cell(note), MAX_COLUMNS - 2)]
    return lines[1:]


def as_markdown(tables: Sequence[Table]) -> list[str]:
    """GitHub-flavoured Markdown; nothing in a cell can act as markup."""
    lines: list[str] = []
    for table in tables:
        lines += ["", f"## {_markdown(table.title)}", ""]
        if table.rows:
            headers = table.headers if any(table.headers) else [""] * len(table.rows[0])
            lines.append(_markdown_row(headers))
            lines.append(
                "|" + "|".join("---:" if i in table.right else "---" for i in range(len(headers))) + "|"
            )
            lines += [_markdown_row(row) for row in table.rows]
        for note in table.notes:
            lines += ["", _markdown(note)]
    return lines[1:]


def wrap(text: str, width: int) -> list[str]:
    """Words over lines; a word is never broken, so that a link or a path stays whole."""
    import textwrap

    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def _text_table(table: Table) -> list[str]:
    rows = [[cell(value) for value in row] for row in table.rows]
    if not rows:
        return []
    rows = _fit(rows, table.headers, MAX_COLUMNS - 2)
    if not any(table.headers):
        return output.table(table.headers, rows, right=sorted(table.right))[2:]
    return output.table(table.headers, rows, right=sorted(table.right))


def _fit(rows: list[list[str]], headers: Sequence[str], width: int) -> list[list[str]]:
    """Wrap the cells of the last column into further rows where the table is too wide."""
    last = len(headers) - 1
    used = sum(max(len(headers[i]), *(len(row[i]) for row in rows)) + 2 for i in range(last))
    room = max(width - used, len(headers[last]), 20)
    fitted = []
    for row in rows:
        first, *more = wrap(row[last], room)
        fitted.append([*row[:last], first])
        fitted += [[""] * last + [line] for line in more]
    return fitted


# Not "_": within a word it is no markup, and every name here is full of it.
_MARKUP = {ord(c): f"\\{c}" for c in "\\`*[]<>|"}


def _markdown(text: str) -> str:
    return cell(text).translate(_MARKUP)


def _markdown_row(row: Sequence[str]) -> str:
    return "| " + " | ".join(_markdown(value) for value in row) + " |"
