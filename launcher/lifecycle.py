"""A run's life as the launcher drives it: submit it once, adopt it if it is there, see how it is, cancel it.

Works with any backend; what a backend's and a run directory's facts mean together is ``launcher.states``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from influence import rundir
from influence.rundir import RunDirError, RunPaths, RunSpec
from influence.rundir.clock import parse_time
from launcher.backends import Backend
from launcher.errors import (
    BackendError,
    ConflictError,
    IncompleteError,
    LauncherError,
    NotFoundError,
    SpecError,
    UsageError,
)
from launcher.places import suggest
from launcher.states import Phase, RunFacts, RunStatus, State, derive

_ERRORS: tuple[tuple[type[RunDirError], type[LauncherError]], ...] = (
    (rundir.RunNameError, UsageError),
    (rundir.NotARunError, NotFoundError),
    (rundir.SchemaVersionError, SpecError),
    (rundir.ConflictError, ConflictError),
    (rundir.StorageError, BackendError),
    (rundir.CorruptError, IncompleteError),
)


@contextmanager
def run_dir_errors() -> Iterator[None]:
    """Turn errors of the run directory into the launcher's, which have exit codes."""
    try:
        yield
    except RunDirError as error:
        place = "" if error.path is None else f"{error.path}: "
        kind = next((ours for theirs, ours in _ERRORS if isinstance(error, theirs)), LauncherError)
        raise kind(f"{place}{error.reason}", next_step=error.next_step) from error
    except OSError as error:
        if error.filename is None:  # a pipe, or the current directory: not the run's
            raise
        raise BackendError(
            f"{error.filename}: {error.strerror}", next_step="check the permissions and the filesystem"
        ) from error


class Action(StrEnum):
    """What a submit does with a run's name."""

    CREATE = "create"
    ADOPT = "adopt"  # it is under way: nothing to start
    RESTART = "restart"  # it is there, and nothing runs it
    COMPLETE = "complete"  # every step is there: nothing to do


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a submit will do; made without changing anything."""

    run: RunSpec
    paths: RunPaths
    action: Action
    status: RunStatus | None
    """The run as it is now; None when there is none."""

    @property
    def sentence(self) -> str:
        """The plan in words."""
        name = f"run '{self.run.run}'"
        if self.action is Action.CREATE or self.status is None:
            return f"{name} is new"
        state = f"{self.status.state} ({self.status.reason})"
        return {
            Action.ADOPT: f"{name} exists with the same spec and is {state}: adopted, nothing started",
            Action.RESTART: f"{name} exists with the same spec and is {state}: adopted, and started again",
            Action.COMPLETE: f"{name} exists with the same spec and is complete: nothing to do",
        }[self.action]


def plan_submit(backend: Backend, root: Path, run: RunSpec) -> Plan:
    """Adopt or refuse.

    Raises:
        ConflictError: another spec has this name; ``why`` lists what differs. Or the run is being stopped.
        UsageError, SpecError, IncompleteError, BackendError: what lies there is no run that can be adopted.
    """
    with run_dir_errors():
        paths = RunPaths.of(root, run.run)
        try:
            existing = rundir.read_run(paths)
        except rundir.NotARunError:
            _refuse_foreign(paths)
            return Plan(run=run, paths=paths, action=Action.CREATE, status=None)
    if existing.spec_hash != run.spec_hash:
        raise _conflict(paths, rundir.difference(existing.spec, run.spec))
    status = run_status(backend, root, run.run)
    if status.state is State.UNKNOWN:
        raise BackendError(
            f"run '{run.run}' exists with the same spec, but its state is unknown",
            why=status.reason,
            next_step=suggest("status", run.run, root=root),
        )
    if status.state is State.TERMINATING:
        raise ConflictError(
            f"run '{run.run}' exists with the same spec and is being stopped; nothing was started",
            why=status.reason,
            next_step=f"submit again when it has ended: {suggest('status', run.run, '--wait', root=root)}",
        )
    if status.state is State.SUCCEEDED:
        action = Action.COMPLETE
    elif status.state.terminal or backend.get(run.run).phase is Phase.NEVER_STARTED:
        action = Action.RESTART
    else:
        action = Action.ADOPT
    return Plan(run=run, paths=paths, action=action, status=status)


def carry_out(backend: Backend, plan: Plan) -> bool:
    """Do what a plan says; returns whether this call started the run (False: somebody else was quicker).

    Raises:
        ConflictError: another spec took the name since the plan was made.
        BackendError: the backend, or the filesystem, refuses.
    """
    if plan.action in (Action.ADOPT, Action.COMPLETE):
        return False
    with run_dir_errors():
        try:
            rundir.create_run(plan.paths, plan.run)
        except rundir.ConflictError as error:
            raise _conflict(plan.paths, error.difference) from error
        return backend.submit(plan.paths, plan.run)


def require_room(backend: Backend, root: Path, run: RunSpec, request: Sequence[str]) -> None:
    """Refuse a run that the backend's machines cannot execute, before anything is changed.

    Args:
        request: the user's own options (``--preset``, ...), for the commands that the message suggests.

    Raises:
        BackendError: names what is lacking and what would work.
    """
    refusal = backend.refusal(run)
    if refusal is None:
        return
    elsewhere = suggest("render", *request, "--backend", "kubernetes")
    on_a_cpu = suggest("submit", *request, "--overlay", "tiny-cpu", root=root)
    fits = refusal.device == "cuda" and "tiny-cpu" not in run.spec["overlays"]
    raise BackendError(
        f"preset '{run.spec['preset']}' cannot run on the backend '{backend.name}'",
        why="it needs " + ", and ".join(refusal.lacking),
        next_step=f"{on_a_cpu} (the same job, small, on a CPU), or `{elsewhere}` for a cluster's Job"
        if fits
        else f"free or add it, or choose smaller settings with --set hardware...=..., or `{elsewhere}`",
    )


def run_status(backend: Backend, root: Path, run: str) -> RunStatus:
    """The state of one run.

    Raises:
        UsageError: not a name that a run can have.
        NotFoundError: there is no such run.
    """
    with run_dir_errors():
        paths = RunPaths.of(root, run)
    facts = backend.get(run)
    if not paths.root_dir.is_dir():
        listing = suggest("status", root=root)
        raise NotFoundError(f"no run '{run}' in {root}", next_step=f"{listing} (lists the runs there are)")
    return derive(facts, read_facts(paths), now_s=time.time())


def run_statuses(backend: Backend, root: Path) -> list[RunStatus]:
    """The state of every run that the backend or the root holds, by name; a broken one is UNKNOWN.

    Raises:
        BackendError: the root cannot be listed.
    """
    with run_dir_errors():
        facts = backend.list()
    now_s = time.time()
    return [derive(facts[name], _facts_by_name(root, name), now_s=now_s) for name in sorted(facts)]


def _facts_by_name(root: Path, name: str) -> RunFacts:
    try:
        return read_facts(RunPaths.of(root, name))
    except RunDirError as error:
        return RunFacts(run=name, run_dir=str(root / name), unreadable=_reason(error))


def read_facts(paths: RunPaths) -> RunFacts:
    """What the run directory says; what is wrong with it, if it cannot be read."""
    damaged: list[rundir.CorruptError] = []
    try:
        run = rundir.read_run(paths)
        records = rundir.committed_steps(paths, damaged=damaged)
        attempts = paths.attempt_numbers()
    except RunDirError as error:
        return RunFacts(run=paths.name, run_dir=str(paths.root_dir), unreadable=_reason(error))
    try:
        spec, wandb = run.spec, run.wandb
        total_steps = int(spec["training"]["total_steps"])
        committed = [records[step] for step in range(1, total_steps + 1) if step in records]
        return RunFacts(
            run=paths.name,
            run_dir=str(paths.root_dir),
            preset=spec["preset"],
            overlays=tuple(spec["overlays"]),
            spec_hash=run.spec_hash,
            total_steps=total_steps,
            num_committed=len(committed),
            missing_steps=tuple(step for step in range(1, total_steps + 1) if step not in records),
            damaged=tuple(_reason(error) for error in damaged),
            attempt=max(attempts, default=None),
            last_step_at_s=max((_seconds(record.committed_at) for record in committed), default=None),
            backoff_limit=int(spec["retry"]["backoff_limit"]),
            wandb_url=wandb.get("url"),
            wandb_mode=wandb.get("mode"),
            submit_command=submit_command(run, paths.root_dir.parent),
            root=paths.root_dir.parent,
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"run.json lacks what a run has ({type(error).__name__}: {error})"
        return RunFacts(run=paths.name, run_dir=str(paths.root_dir), unreadable=reason)


def submit_command(run: RunSpec, root: Path) -> str:
    """The command that submits this spec again under this name, from where it was first submitted.

    Args:
        root: the folder that holds the run now.
    """
    words = [word for word in run.provenance.get("command", ()) if word != "--debug"]
    if words[:2] != ["launcher", "submit"]:
        words = ["launcher", "submit", "--preset", run.spec["preset"]]
        words += [word for overlay in run.spec["overlays"] for word in ("--overlay", overlay)]
    kept = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in ("--name", "--suffix", "--root", "--output", "-o"):
            skip = True
        elif word not in ("--follow", "--dry-run") and not word.startswith(
            ("--name=", "--suffix=", "--root=", "--output=", "-o")
        ):
            kept.append(word)
    return suggest(*kept[1:], "--name", run.run, root=root)


def _refuse_foreign(paths: RunPaths) -> None:
    """A folder that holds something and no ``run.json`` is somebody else's: nothing is put into it."""
    known = {"local"}  # a submit that was killed before it wrote run.json
    try:
        foreign = sorted(entry.name for entry in paths.root_dir.iterdir() if entry.name not in known)
    except FileNotFoundError:
        return
    except OSError as error:
        raise rundir.StorageError.from_os_error(error, paths.root_dir, "listing") from None
    if any(not name.startswith(".run.json.") for name in foreign):
        raise UsageError(
            f"{paths.root_dir} exists and is no run: it has no run.json, but {', '.join(foreign[:3])}",
            next_step="choose another --name or --root, or move it away",
        )


def _conflict(paths: RunPaths, difference: Sequence[str]) -> ConflictError:
    return ConflictError(
        f"run '{paths.name}' exists with another spec; nothing was changed",
        why="there -> now:\n" + "\n".join(f"          {line}" for line in difference),
        next_step="give this one another name (--name or --suffix), or submit the existing run's settings",
    )


def _seconds(timestamp: str) -> float:
    return parse_time(timestamp).timestamp()


def _reason(error: RunDirError) -> str:
    place = "" if error.path is None else f"{error.path}: "
    return f"{place}{error.reason}"
