"""The index of collected runs: a SQLite cache over manifests, to be deleted and rebuilt at any time.

It holds nothing that the results folders do not hold, and of that only names, numbers and times: no command
lines, no reasons, no environment. Whatever is wrong with it (damage, another version) is cured by making it
anew. Every writer reads a run's manifest from the results folder itself, so writers that come together
leave what any one of them would have left.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.database import Database, default_path
from launcher.errors import LauncherError
from launcher.evidence import WHOLE, CollectedRun, collected_names, npz_name, read_collected
from launcher.manifest import MANIFEST_NAME

_Row = tuple[Any, ...]

# Key of every table: the results folder (absolute, links resolved) and the run's name.
_COLUMNS: dict[str, Sequence[str]] = {
    "runs": (
        "folder TEXT", "run TEXT",
        "state TEXT", "preset TEXT", "overlays TEXT", "spec_hash TEXT", "model TEXT", "device TEXT",
        "git_commit TEXT", "dirty INTEGER", "total_steps INTEGER", "steps INTEGER", "rows INTEGER",
        "positions INTEGER", "nan_count INTEGER", "scoring_s REAL", "started_at TEXT", "last_commit_at TEXT",
        "manifest_bytes INTEGER", "manifest_mtime_ns INTEGER",
    ),
    "attempts": (
        "folder TEXT", "run TEXT", "attempt INTEGER",
        "started_at TEXT", "ended_at TEXT", "exit_code INTEGER", "resumed_from INTEGER", "host TEXT",
    ),
    "steps": (
        "folder TEXT", "run TEXT", "step INTEGER",
        "attempt INTEGER", "file TEXT", "bytes INTEGER", "sha256 TEXT", "rows INTEGER", "positions INTEGER",
        "nan_count INTEGER", "replay INTEGER", "verified INTEGER", "committed_at TEXT",
    ),
    "timings": ("folder TEXT", "run TEXT", "step INTEGER", "name TEXT", "seconds REAL"),
    "metrics": ("folder TEXT", "run TEXT", "step INTEGER", "name TEXT", "value REAL"),
    "links": ("folder TEXT", "run TEXT", "kind TEXT", "mode TEXT", "url TEXT", "verified INTEGER"),
}  # fmt: skip
_KEYS = {
    "runs": "folder, run",
    "attempts": "folder, run, attempt",
    "steps": "folder, run, step",
    "timings": "folder, run, step, name",
    "metrics": "folder, run, step, name",
    "links": "folder, run, kind",
}
_SCHEMA = [
    f"CREATE TABLE {table} ({', '.join(columns)}, PRIMARY KEY ({_KEYS[table]})) WITHOUT ROWID"
    for table, columns in _COLUMNS.items()
]


class Index:
    """The index file. Open it with a ``with`` statement.

    Args:
        path: the file; by default ``INFL_INDEX``, or one in the user's cache directory.
        tell: told in words when the index had to be made anew, or cannot be kept.

    Raises:
        UsageError: what lies there is no index of the launcher.
        LauncherError: SQLite fails for a reason that a new index would not cure (locked for long).
    """

    def __init__(self, path: Path | None = None, tell: Callable[[str], None] = lambda _: None) -> None:
        self._database = Database(path or default_path(), _SCHEMA, tell)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    @property
    def path(self) -> Path:
        return self._database.path

    def update(self, results_dir: Path, run: str) -> None:
        """Take in one collected run as its manifest stands now; raises as ``read_collected``."""
        rows = _rows(results_dir, run)
        folder = str(results_dir.resolve())
        self._database.write(lambda connection: _replace_run(connection, folder, run, rows))

    def refresh(self, results_dir: Path) -> list[LauncherError]:
        """Take in what changed in a results folder since it was indexed; returns what cannot be read."""
        folder = str(results_dir.resolve())
        known = {
            run: (num_bytes, mtime_ns)
            for run, num_bytes, mtime_ns in self._database.read(
                "SELECT run, manifest_bytes, manifest_mtime_ns FROM runs WHERE folder = ?", (folder,)
            )
        }
        present = collected_names(results_dir)
        changed = [run for run in present if known.get(run) != _stamp(results_dir, run)]
        read, problems = _read_all(results_dir, changed)
        gone = known.keys() - set(present) | set(changed)

        def apply(connection: sqlite3.Connection) -> None:
            for run in gone:
                _replace_run(connection, folder, run, read.get(run, {}))

        if gone:
            self._database.write(apply)
        return problems

    def rebuild(self, results_dirs: Iterable[Path]) -> list[LauncherError]:
        """Make the index anew from these folders and all that it knows; returns what cannot be read."""
        folders = sorted({str(path.resolve()) for path in results_dirs} | set(self.folders()))
        everything: list[tuple[str, str, Mapping[str, Sequence[_Row]]]] = []
        problems = []
        for folder in folders:
            read, unreadable = _read_all(Path(folder), collected_names(Path(folder)))
            everything += [(folder, run, rows) for run, rows in read.items()]
            problems += unreadable

        def apply(connection: sqlite3.Connection) -> None:
            for table in _COLUMNS:
                connection.execute(f"DELETE FROM {table}")  # noqa: S608 - our own constant
            for folder, run, rows in everything:
                _replace_run(connection, folder, run, rows)

        self._database.write(apply)
        return problems

    def folders(self) -> list[str]:
        """The results folders of which the index knows a run."""
        return [
            folder for (folder,) in self._database.read("SELECT DISTINCT folder FROM runs ORDER BY folder")
        ]

    def runs(self, results_dir: Path | None = None) -> list[dict[str, Any]]:
        """Rows of the table ``runs`` with the W&B link, the latest start first; of one folder or of all."""
        where, values = (
            ("", ()) if results_dir is None else ("WHERE folder = ?", (str(results_dir.resolve()),))
        )
        names = [column.split()[0] for column in _COLUMNS["runs"]] + ["wandb_mode", "wandb_url"]
        rows = self._database.read(
            "SELECT runs.*, links.mode, links.url FROM runs LEFT JOIN links USING (folder, run) "  # noqa: S608
            f"{where} ORDER BY started_at DESC, folder, run",
            values,
        )
        return [dict(zip(names, row, strict=True)) for row in rows]

    def dump(self) -> dict[str, list[_Row]]:
        """All rows by table, in the order of their keys."""
        return {
            table: self._database.read(f"SELECT * FROM {table} ORDER BY {_KEYS[table]}")  # noqa: S608
            for table in _COLUMNS
        }


def _read_all(
    results_dir: Path, runs: Iterable[str]
) -> tuple[dict[str, Mapping[str, Sequence[_Row]]], list[LauncherError]]:
    read: dict[str, Mapping[str, Sequence[_Row]]] = {}
    problems = []
    for run in runs:
        try:
            read[run] = _rows(results_dir, run)
        except LauncherError as error:
            problems.append(error)
    return read, problems


def _stamp(results_dir: Path, run: str) -> tuple[int, int]:
    """Tells whether a manifest was replaced: it is only ever written anew."""
    try:
        found = (results_dir / run / MANIFEST_NAME).lstat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _replace_run(
    connection: sqlite3.Connection, folder: str, run: str, rows: Mapping[str, Sequence[_Row]]
) -> None:
    for table, columns in _COLUMNS.items():
        connection.execute(f"DELETE FROM {table} WHERE folder = ? AND run = ?", (folder, run))  # noqa: S608
        marks = ", ".join("?" * len(columns))
        values = [(folder, run, *map(_storable, row)) for row in rows.get(table, ())]
        connection.executemany(f"INSERT INTO {table} VALUES ({marks})", values)  # noqa: S608


def _rows(results_dir: Path, run: str) -> dict[str, list[_Row]]:
    """A run's rows by table, without the key's first two columns; raises as ``read_collected``."""
    # Before reading: if the manifest is replaced meanwhile, the next refresh sees that it was.
    stamp = _stamp(results_dir, run)
    collected = read_collected(results_dir, run)
    return {
        "runs": [(*_run_row(collected), *stamp)],
        "attempts": [
            (a.number, a.started_at, a.ended_at, a.exit_code, a.resumed_from, a.host)
            for a in collected.attempts
        ],
        "steps": [
            (
                step, r.attempt, npz_name(r), r.bytes, r.sha256, r.rows, r.positions, r.nan_count,
                int(r.replay), int(collected.facts(step) is not None), r.committed_at,
            )
            for step, r in collected.steps.items()
        ],
        "timings": [
            (step, name, _finite(value))
            for step in collected.steps
            for name, value in sorted(collected.timings(step).items())
        ],
        "metrics": [
            (step, name, _finite(value))
            for step in collected.steps
            for name, value in sorted(collected.metrics[step].items())
        ],
        "links": [("wandb", collected.wandb_mode, collected.wandb_url, 0)],
    }  # fmt: skip


def _run_row(run: CollectedRun) -> _Row:
    facts = [found for step in run.steps if (found := run.facts(step)) is not None]
    scoring = [seconds for step in run.steps if (seconds := run.timings(step).get(WHOLE)) is not None]
    dirty = run.setting("code.dirty")
    return (
        run.manifest.state,
        str(run.setting("preset", "")),
        " ".join(str(overlay) for overlay in run.setting("overlays") or ()),
        run.run_spec.spec_hash,
        str(run.setting("model.path", "")),
        str(run.setting("hardware.device", "")),
        run.setting("code.git_commit"),
        None if dirty is None else int(bool(dirty)),
        run.manifest.num_total_steps,
        len(facts),
        sum(found.num_rows for found in facts),
        sum(found.num_positions for found in facts),
        sum(found.num_nan for found in facts),
        _finite(math.fsum(scoring) / len(scoring)) if scoring else None,
        run.started_at,
        max((record.committed_at for record in run.steps.values()), default=None),
    )


def _storable(value: Any) -> Any:
    """A string as SQLite takes it: JSON can hold halves of characters, UTF-8 cannot."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
