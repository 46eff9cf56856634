"""A collected run as its copy shows it: what the index and the report are made from.

Nothing here looks at the run directory that was collected, at a backend or at W&B.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from influence.rundir.attempts import AttemptRecord, list_attempts
from influence.rundir.clock import parse_time
from influence.rundir.errors import CorruptError, RunDirError, RunNameError
from influence.rundir.files import list_dir, read_inside
from influence.rundir.lineage import committed_steps
from influence.rundir.metrics import read_metrics
from influence.rundir.paths import RunPaths
from influence.rundir.record import CommitRecord, read_record
from influence.rundir.spec import RunSpec, read_run
from launcher.errors import IncompleteError, NotFoundError, UsageError
from launcher.manifest import MANIFEST_NAME, Manifest, ScoreFacts, read_manifest
from launcher.places import suggest

PHASES = ("grad_staging", "hessian_solve", "token_scoring", "score_aggregation", "other")
"""The parts of `WHOLE`, in the order of their execution."""
WHOLE = "pop_rows"

FRACTIONS = ("fused_fraction", "shared_fraction", "separate_fraction", "on_policy_fraction")
"""Of a step's captured rows."""
_FALLBACK = "fallback_"
_GROUP_COUNTS = (
    "groups", "skipped_groups", "interpolated_groups", "double_sign_groups",
    "nonfinite_drops", "solve_floors",
)  # fmt: skip

_COUNT_PREFIX = "influence_trace/"
_MAX_EVENTS_BYTES = 1 << 26
_TIMING_PREFIXES = ("timing_s/influence_", "timing_s/", "influence_")


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedRun:
    """Everything that a collected copy says about its run."""

    folder: Path
    """The results folder that holds the copy, as an absolute path."""
    manifest: Manifest
    run_spec: RunSpec
    attempts: tuple[AttemptRecord, ...]
    """In increasing order; how one ended that could not say so itself is the local supervisor's word."""
    steps: Mapping[int, CommitRecord]
    """The collected steps, in increasing order: the lineage that leads to the last one."""
    replays: tuple[CommitRecord, ...]
    """Every commit of a step that had been committed before, whether or not the lineage leads through it."""
    metrics: Mapping[int, Mapping[str, float]]
    """By step: what the commit record and the trainer's metrics say, the record first."""

    @property
    def run(self) -> str:
        return self.manifest.run

    def setting(self, path: str, default: Any = None) -> Any:
        """A value of the resolved spec, e.g. ``setting("training.total_steps")``."""
        value: Any = self.run_spec.spec
        for key in path.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return value

    def facts(self, step: int) -> ScoreFacts | None:
        """What the step's score file contains; None where the file was not verified."""
        record = self.steps[step]
        facts = self.manifest.scores.get(npz_name(record))
        return facts if facts is not None and facts.sha256 == record.sha256 else None

    def timings(self, step: int) -> dict[str, float]:
        """Seconds by phase name, without prefixes; the commit record's word goes before the metrics'."""
        named = {}
        for name, value in self.metrics[step].items():
            if name.startswith("timing_s/"):
                named[_plain_timing(name)] = value
        return named | {_plain_timing(name): value for name, value in self.steps[step].timings.items()}

    def counter(self, step: int, name: str) -> float | None:
        """One of the tracer's own counters, as the commit record or the trainer's metrics have it."""
        found = self.steps[step].metrics.get(name)
        return self.metrics[step].get(f"{_COUNT_PREFIX}{name}") if found is None else found

    def capture_counts(self, step: int) -> dict[str, float]:
        """How the step was captured: those of the tracer's counters that say it, as far as it has them."""
        named = {name.removeprefix(_COUNT_PREFIX) for name in self.metrics[step]}
        # Whatever the reasons are: a later trainer may have others.
        reasons = sorted(name for name in named if name.startswith(_FALLBACK))
        counts = {name: self.counter(step, name) for name in (*FRACTIONS, *reasons, *_GROUP_COUNTS)}
        return {name: value for name, value in counts.items() if value is not None}

    @property
    def started_at(self) -> str | None:
        """When the first attempt started, ISO 8601."""
        return self.attempts[0].started_at if self.attempts else None

    @property
    def wandb_mode(self) -> str:
        return str(self.run_spec.wandb.get("mode", "disabled"))

    @property
    def wandb_url(self) -> str | None:
        """The link to the W&B run, built and not looked up; None if there is none, or its entity is unknown.

        An offline run has it after ``wandb sync``.
        """
        wandb = self.run_spec.wandb
        if self.wandb_mode == "disabled":
            return None
        url = wandb.get("url")
        if isinstance(url, str) and urlsplit(url).scheme in ("https", "http") and "@" not in url:
            return url
        parts = [wandb.get(key) for key in ("entity", "project", "run_id")]
        if not all(isinstance(part, str) and part for part in parts):
            return None
        entity, project, run_id = (quote(str(part), safe="") for part in parts)
        return f"https://wandb.ai/{entity}/{project}/runs/{run_id}"


def npz_name(record: CommitRecord) -> str:
    """The record's score file, relative to the run."""
    return record.npz(RunPaths(Path())).as_posix()


def read_collected(results_dir: Path, run: str) -> CollectedRun:
    """Read a collected copy.

    Raises:
        UsageError: no run can have this name.
        NotFoundError: no such copy; names near matches.
        IncompleteError: the copy's own files are damaged; names the file.
    """
    try:
        paths = RunPaths.of(results_dir, run)
    except RunNameError as error:
        raise UsageError(error.reason, next_step=error.next_step) from None
    except CorruptError as error:
        raise IncompleteError(str(error.path), why=error.reason, next_step=error.next_step) from None
    again = suggest("collect", "--run", run, results=results_dir)
    try:
        manifest = read_manifest(paths.root_dir)
        if manifest is None:
            raise _not_collected(results_dir, run)
        run_spec = read_run(paths)
        steps = committed_steps(paths)
        return CollectedRun(
            folder=paths.root_dir.parent,
            manifest=manifest,
            run_spec=run_spec,
            attempts=_attempts(paths),
            steps=steps,
            replays=tuple(
                read_record(paths, step, attempt)
                for attempt, replayed in paths.replayed_step_numbers().items()
                for step in replayed
            ),
            metrics=_metrics(paths, steps),
        )
    except RunDirError as error:
        raise IncompleteError(
            f"{error.path}: {error.reason}",
            why="the collected copy is damaged or was changed",
            next_step=again,
        ) from None


def collected_names(results_dir: Path) -> list[str]:
    """The runs that have a manifest in a results folder; raises IncompleteError where it cannot be listed."""
    try:
        found = list_dir(results_dir.resolve())
    except RunDirError as error:
        raise IncompleteError(f"{error.path}: {error.reason}", next_step="choose another --results") from None
    return [path.name for path in found if not path.is_symlink() and (path / MANIFEST_NAME).is_file()]


def _not_collected(results_dir: Path, run: str) -> NotFoundError:
    near = get_close_matches(run, collected_names(results_dir), n=3)
    return NotFoundError(
        f"no collected run '{run}' in {results_dir}",
        why=f"similar names there: {', '.join(near)}" if near else None,
        next_step=suggest("results", "show", near[0], results=results_dir)
        if near
        else suggest("collect", "--run", run, results=results_dir),
    )


def _plain_timing(name: str) -> str:
    for prefix in _TIMING_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _attempts(paths: RunPaths) -> tuple[AttemptRecord, ...]:
    """The attempts; of one that died too hard to say how, what its supervisor saw, where it saw it."""
    seen = {
        event["attempt"]: event
        for event in _events(paths)
        if event.get("event") == "attempt_ended" and type(event.get("attempt")) is int
    }
    attempts = []
    for attempt in list_attempts(paths):
        event = seen.get(attempt.number, {})
        code, at = event.get("exit_code"), event.get("at")
        if attempt.is_open and type(code) is int and -64 <= code <= 255 and isinstance(at, str):
            with suppress(ValueError):
                parse_time(at)
                attempt = replace(attempt, ended_at=at, exit_code=code)
        attempts.append(attempt)
    return tuple(attempts)


def _events(paths: RunPaths) -> Iterator[dict[str, Any]]:
    """Lines of the local supervisor's history; damaged ones are left out."""
    try:
        data = read_inside(paths.root_dir, paths.events_jsonl, max_bytes=_MAX_EVENTS_BYTES)
    except (FileNotFoundError, CorruptError):
        return
    for line in data.splitlines():
        with suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict):
                yield event


def _metrics(paths: RunPaths, steps: Mapping[int, CommitRecord]) -> dict[int, dict[str, float]]:
    logged = {attempt: _logged(paths, attempt) for attempt in {record.attempt for record in steps.values()}}
    return {
        step: logged[record.attempt].get(step, {}) | dict(record.metrics) for step, record in steps.items()
    }


def _logged(paths: RunPaths, attempt: int) -> dict[int, dict[str, float]]:
    """An attempt's own metrics by step; nothing where they are damaged, which the manifest says."""
    try:
        by_step = read_metrics(paths, attempt)
    except CorruptError:
        return {}
    return {
        step: {name: float(value) for name, value in data.items() if _is_number(value)}
        for step, data in by_step.items()
    }


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max
