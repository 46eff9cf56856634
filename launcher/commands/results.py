"""``launcher results``: what was collected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from launcher.commands.options import output_option, results_option
from launcher.errors import ExitCode, LauncherError
from launcher.evidence import read_collected
from launcher.index import Index
from launcher.output import emit, note
from launcher.places import suggest
from launcher.tables import Table, as_markdown, as_text


@click.group("results")
def command() -> None:
    """List, show or rebuild the index of collected results."""


@command.command("list")
@click.option(
    "--all", "every_folder", is_flag=True, help="Runs of every results folder that the index knows."
)
@results_option
@output_option
def list_command(every_folder: bool, results_dir: Path, output_format: str) -> int:
    """List the collected runs, the latest first.

    What changed in the folder since it was indexed is indexed first.
    """
    with Index(tell=note) as index:
        problems = index.refresh(results_dir)
        rows = index.runs(None if every_folder else results_dir)
    _tell(problems)
    if not rows and output_format == "text":
        again = suggest("collect", "--run", "RUN", results=results_dir)
        note(f"nothing collected in {results_dir}; `{again}` does that")
        return int(ExitCode.OK)
    emit(output_format, [_document(row) for row in rows], lambda: as_text(_list_tables(rows)))
    return int(ExitCode.OK)


@command.command("show")
@click.argument("run")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@results_option
@output_option
def show_command(run: str, markdown: bool, results_dir: Path, output_format: str) -> int:
    """Print the tables of a collected run.

    They are scope, validation, score files, capture, timing, code, attempts and links. Everything comes
    from the verified copy; nothing is asked of the run, a backend or W&B.
    """
    from launcher.report import document, tables

    collected = read_collected(results_dir, run)
    render = as_markdown if markdown else as_text
    emit(
        output_format,
        document(collected) if output_format == "json" else None,
        lambda: render(tables(collected)),
    )
    return int(ExitCode.OK)


@command.command("rebuild")
@results_option
@output_option
def rebuild_command(results_dir: Path, output_format: str) -> int:
    """Make the index anew from the copies.

    It takes in the results folder and every other one that it knows. Exit code 6: a collected copy could
    not be read; the others are indexed.
    """
    with Index(tell=note) as index:
        problems = index.rebuild([results_dir])
        num_runs, folders, path = len(index.runs()), index.folders(), index.path
    _tell(problems)
    exit_code = ExitCode.INCOMPLETE if problems else ExitCode.OK
    document = {
        "index": str(path),
        "runs": num_runs,
        "folders": folders,
        "problems": [problem.as_dict() for problem in problems],
        "exit_code": int(exit_code),
    }
    emit(output_format, document, lambda: [f"{path}: runs {num_runs}, results folders {len(folders)}"])
    return int(exit_code)


def _tell(problems: Sequence[LauncherError]) -> None:
    for problem in problems:
        note(f"left out: {problem.what}{f'; next: {problem.next_step}' if problem.next_step else ''}")


def _document(row: dict[str, Any]) -> dict[str, Any]:
    hidden = {"manifest_bytes", "manifest_mtime_ns"}
    shown = {name: value for name, value in row.items() if name not in hidden}
    dirty = row["dirty"]
    return shown | {"overlays": row["overlays"].split(), "dirty": None if dirty is None else bool(dirty)}


def _list_tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    headers = ("run", "state", "steps", "positions", "scoring, s/step", "started", "preset")
    folders = sorted({row["folder"] for row in rows})
    tables = []
    for folder in folders:
        own = [row for row in rows if row["folder"] == folder]
        cells = [
            (
                row["run"],
                row["state"],
                f"{row['steps']}/{row['total_steps']}",
                f"{row['positions']:,}",
                "-" if row["scoring_s"] is None else f"{row['scoring_s']:.3f}",
                (row["started_at"] or "-")[:10],
                " + ".join([row["preset"], *row["overlays"].split()]),
            )
            for row in own
        ]
        tables.append(Table(f"Results in {folder}", headers, cells, right=frozenset({2, 3, 4})))
        links = [(row["run"], row["wandb_url"] or row["wandb_mode"]) for row in own]
        tables.append(Table("W&B (links are built, not looked up)", ("", ""), links))
    return tables
