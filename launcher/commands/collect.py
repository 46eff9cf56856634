"""``launcher collect``: a verified copy of a run's results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import click

from influence.rundir.errors import (
    CorruptError,
    NotARunError,
    RunDirError,
    RunNameError,
    SchemaVersionError,
    StorageError,
)
from influence.rundir.files import list_dir
from influence.rundir.paths import RunPaths
from launcher.collect import Outcome, collect
from launcher.commands.options import Place, output_option, place_options, results_option
from launcher.errors import (
    BackendError,
    ExitCode,
    IncompleteError,
    LauncherError,
    NotFoundError,
    SpecError,
    UsageError,
)
from launcher.index import Index
from launcher.ledger import Progress
from launcher.lifecycle import elsewhere
from launcher.manifest import MANIFEST_NAME, FileEntry
from launcher.output import emit, note, stderr_is_terminal
from launcher.places import suggest
from launcher.report import findings_table
from launcher.site import Site
from launcher.tables import as_text, size

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


@click.command("collect")
@click.option("--run", "run_name", required=True, metavar="RUN", help="The run to collect.")
@click.option(
    "--all-commits",
    is_flag=True,
    help="Also copy score files of steps that a retry computed again and the run did not go on from.",
)
@place_options
@results_option
@output_option
def command(run_name: str, all_commits: bool, place: Place, results_dir: Path, output_format: str) -> int:
    """Copy a run's results to RESULTS/RUN, verify every file, and index them.

    Each score file is compared with its commit record (size and SHA-256). Files that are there already and
    good are not copied again, so an interrupted collect goes on where it stopped, and a run that still goes
    on can be collected again later. Exit code 6: the copy lacks something; what is good was copied.
    """
    site = place.open()
    root = _root(site)
    with _progress(quiet=output_format == "json") as progress:
        outcome = _collect(site, root, run_name, results_dir, progress, all_commits)
    _index(results_dir, run_name)
    complete = outcome.manifest.state == "complete"
    exit_code = ExitCode.OK if complete else ExitCode.INCOMPLETE
    document = outcome.manifest.to_dict() | {
        "results": str(outcome.run_dir),
        "copied": [entry.file for entry in outcome.copied],
        "exit_code": int(exit_code),
    }
    emit(output_format, document, lambda: _lines(outcome, results_dir))
    if not complete and output_format == "text":
        damaged = outcome.manifest.state == "damaged"
        first = (
            "restore or remove what is named above at the source"
            if damaged
            else site.suggest("status", run_name)
        )
        again = site.suggest("collect", "--run", run_name, results=results_dir)
        note(f"next: {first}; then again: {again}")
    return int(exit_code)


def _root(site: Site) -> Path:
    """The folder of run directories; a cluster's must be mounted here."""
    if site.root is None:
        raise BackendError(
            f"the run directories of cluster '{site.name}' are not reachable from here",
            why="the profile has no root: its claim is not mounted on this machine",
            next_step="mount it and give its folder: --root FOLDER, or "
            f"clusters.{site.name}.root in launcher.yaml",
        )
    return site.root


def _collect(
    site: Site, root: Path, run: str, results_dir: Path, progress: Progress, all_commits: bool
) -> Outcome:
    try:
        source = RunPaths.of(root, run)
        if source.root_dir.resolve() == (results_dir / run).resolve():
            raise UsageError(
                f"--results {results_dir} and --root {root} are the same folder",
                next_step="choose another folder for the collected copies",
            )
        if results_dir.resolve() == root.resolve() or results_dir.resolve().is_relative_to(
            source.root_dir.resolve()
        ):
            raise UsageError(
                f"--results {results_dir} would put copies among what is collected from --root {root}",
                next_step="choose another folder for the collected copies",
            )
        return collect(source, results_dir, progress, all_commits=all_commits)
    except NotARunError:
        raise _not_found(site, root, run, results_dir) from None
    except RunDirError as error:
        raise _launcher_error(error, site, source_dir=root, run=run) from None


def _launcher_error(error: RunDirError, site: Site, source_dir: Path, run: str) -> LauncherError:
    place = "" if error.path is None else f"{error.path}: "
    if isinstance(error, RunNameError):
        return UsageError(error.reason, next_step=error.next_step)
    if isinstance(error, SchemaVersionError):
        return SpecError(f"{place}{error.reason}", next_step=error.next_step)
    if isinstance(error, CorruptError):
        return IncompleteError(f"{place}{error.reason}", next_step=error.next_step)
    if isinstance(error, StorageError) and error.path and error.path.is_relative_to(source_dir.absolute()):
        return BackendError(f"{place}{error.reason}", next_step=error.next_step)
    return IncompleteError(
        f"{place}{error.reason}",
        why="what was copied and verified so far is kept",
        next_step="free space there or choose another --results, then: "
        + site.suggest("collect", "--run", run),
    )


def _not_found(site: Site, root: Path, run: str, results_dir: Path) -> NotFoundError:
    runs: list[str] = []
    with suppress(RunDirError):
        runs = [path.name for path in list_dir(root.resolve()) if (path / "run.json").is_file()]
    near = get_close_matches(run, runs, n=3)
    why = f"similar names there: {', '.join(near)}" if near else elsewhere(site)
    next_step = f"{site.suggest('status')} (lists the runs)"
    if near:
        next_step = site.suggest("collect", "--run", near[0], results=results_dir)
    if (results_dir / run / MANIFEST_NAME).is_file():
        why = f"a copy that was collected before is in {results_dir}"
        next_step = suggest("results", "show", run, results=results_dir)
    return NotFoundError(f"no run '{run}' in {root}", why=why, next_step=next_step)


def _index(results_dir: Path, run: str) -> None:
    """The index is a cache: trouble with it is told, and the collect has succeeded all the same."""
    try:
        with Index(tell=note) as index:
            index.update(results_dir, run)
    except LauncherError as error:
        note(f"not indexed: {error.what}{f' ({error.why})' if error.why else ''}")


def _lines(outcome: Outcome, results_dir: Path) -> list[str]:
    manifest = outcome.manifest
    num_steps = sum(entry.file in manifest.scores for entry in manifest.files)
    copied_bytes = sum(entry.num_bytes for entry in outcome.copied)
    lines = [
        f"{manifest.run}: {manifest.state}; {num_steps} of {manifest.num_total_steps} steps verified",
        f"  copied {len(outcome.copied)} files ({size(copied_bytes)}), "
        f"{len(manifest.files) - len(outcome.copied)} were there already, to {outcome.run_dir}",
    ]
    table = findings_table(manifest)
    if table is not None:
        lines += ["", *as_text([table]), ""]
    return [*lines, f"Its tables: {suggest('results', 'show', manifest.run, results=results_dir)}"]


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Progress]:
    """A bar on a terminal, a line a score file elsewhere, nothing beside JSON."""
    if stderr_is_terminal():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
            yield _Bar(bar)
    else:
        yield Progress() if quiet else _Lines()


class _Lines(Progress):
    def waiting(self) -> None:
        note("another collect of this run is at work; waiting for it")

    def copied(self, entry: FileEntry) -> None:
        if entry.file.endswith(".npz"):
            note(f"copied {entry.file} ({size(entry.num_bytes)})")


class _Bar(Progress):
    def __init__(self, bar: RichProgress) -> None:
        self._bar = bar
        self._task: TaskID | None = None

    def waiting(self) -> None:
        self._bar.console.print("another collect of this run is at work; waiting for it")

    def start(self, num_files: int, num_bytes: int) -> None:
        self._task = self._bar.add_task(f"{num_files} score files", total=num_bytes)

    def advance(self, num_bytes: int) -> None:
        if self._task is not None:
            self._bar.advance(self._task, num_bytes)


__all__ = ["command"]
