"""What is known of a run before its state is derived: from its directory, or from the document that its
backend holds where the directory cannot be read here."""

from __future__ import annotations

from typing import Any

from influence import rundir
from influence.rundir import RunDirError, RunPaths, RunSpec
from influence.rundir.clock import parse_time
from launcher.places import suggest
from launcher.rundir_errors import in_words
from launcher.states import RunFacts

# Options of a submit that say nothing about the spec: the name is added, the place where the run is now, too.
_WITH_VALUE = ("--name", "--suffix", "--root", "--output", "-o", "--cluster", "--config")
_ALONE = ("--follow", "--dry-run", "--debug")


def read_facts(paths: RunPaths, options: tuple[str, ...] = (), *, local: bool = True) -> RunFacts:
    """What the run directory says; what is wrong with it, if it cannot be read.

    Args:
        options: ``Site.options``.
        local: whether the run executes on this machine, so that its directory lies nowhere else.
    """
    damaged: list[rundir.CorruptError] = []
    run_dir = str(paths.root_dir)
    try:
        run = rundir.read_run(paths)
        records = rundir.committed_steps(paths, damaged=damaged)
        attempts = paths.attempt_numbers()
    except RunDirError as error:
        return RunFacts(run=paths.name, run_dir=run_dir, unreadable=in_words(error))
    try:
        total_steps = int(run.spec["training"]["total_steps"])
        committed = [records[step] for step in range(1, total_steps + 1) if step in records]
        return RunFacts(
            **_of_document(run, options),
            run_dir=run_dir,
            storage=None if local else storage(run),
            total_steps=total_steps,
            num_committed=len(committed),
            missing_steps=tuple(step for step in range(1, total_steps + 1) if step not in records),
            damaged=tuple(in_words(error) for error in damaged),
            attempt=max(attempts, default=None),
            last_step_at_s=max((_seconds(record.committed_at) for record in committed), default=None),
        )
    except (KeyError, TypeError, ValueError) as error:
        reason = f"run.json lacks what a run has ({type(error).__name__}: {error})"
        return RunFacts(run=paths.name, run_dir=run_dir, unreadable=reason)


def facts_without_directory(
    run: str,
    document: RunSpec | None,
    options: tuple[str, ...] = (),
    *,
    run_dir: str | None = None,
    why: str | None = None,
) -> RunFacts:
    """What the backend's document says of a run whose directory cannot be read here.

    Args:
        document: None where the backend did not give it.
        options: ``Site.options``.
        run_dir: where this machine would see the directory; None where it does not.
        why: why a directory that should be readable is not.
    """
    if document is None:
        return RunFacts(run=run, run_dir=run_dir, options=options, out_of_reach=why)
    try:
        known = _of_document(document, options)
        return RunFacts(**known, run_dir=run_dir, storage=storage(document), out_of_reach=why)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"the run document lacks what a run has ({type(error).__name__}: {error})"
        return RunFacts(run=run, run_dir=run_dir, unreadable=reason)


def storage(run: RunSpec) -> str | None:
    """Where a cluster's run keeps its directory, in words; None where its spec does not say."""
    cluster = run.spec.get("cluster", {})
    if cluster.get("storage") == "object_store":
        return f"{str(cluster.get('object_store')).rstrip('/')}/{run.run}"
    if cluster.get("storage") == "claim":
        return f"{run.run} in the claim {cluster.get('claim')}"
    return f"{run.run} on the disk of its pod" if cluster.get("storage") == "ephemeral" else None


def _of_document(run: RunSpec, options: tuple[str, ...]) -> dict[str, Any]:
    return {
        "run": run.run,
        "preset": run.spec["preset"],
        "overlays": tuple(run.spec["overlays"]),
        "spec_hash": run.spec_hash,
        "backoff_limit": int(run.spec["retry"]["backoff_limit"]),
        "wandb_url": run.wandb.get("url"),
        "wandb_mode": run.wandb.get("mode"),
        "submit_command": submit_command(run, options),
        "options": options,
    }


def submit_command(run: RunSpec, options: tuple[str, ...] = ()) -> str:
    """The command that submits this spec again under this name, from where it was first submitted.

    Args:
        options: ``Site.options`` of the place where the run is now.
    """
    words = [word for word in run.provenance.get("command", ()) if word not in _ALONE]
    if words[:2] != ["launcher", "submit"]:
        words = ["launcher", "submit", "--preset", run.spec["preset"]]
        words += [word for overlay in run.spec["overlays"] for word in ("--overlay", overlay)]
    kept = []
    skip = False
    for word in words[1:]:
        if skip:
            skip = False
        elif word in _WITH_VALUE:
            skip = True
        elif not word.startswith((*(f"{option}=" for option in _WITH_VALUE if option != "-o"), "-o")):
            kept.append(word)
    return suggest(*kept, "--name", run.run, *options)


def _seconds(timestamp: str) -> float:
    return parse_time(timestamp).timestamp()
