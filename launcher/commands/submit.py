"""``launcher submit``: start a run of a preset, or adopt the one that exists."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from launcher.backends import BACKENDS
from launcher.commands.options import Place, output_option, place_options
from launcher.commands.preset_options import RunRequest, run_options
from launcher.commands.status import detail_lines
from launcher.errors import ExitCode
from launcher.lifecycle import Action, Plan, carry_out, plan_submit, require_nodes, require_room, run_status
from launcher.output import emit, note
from launcher.places import suggest
from launcher.progress import LastLogLine, follow
from launcher.working_tree import require_published

if TYPE_CHECKING:
    from influence.rundir import RunSpec
    from launcher.site import Site
    from launcher.states import RunStatus


@click.command("submit")
@run_options
@click.option(
    "--backend", type=click.Choice(list(BACKENDS)),
    help="What the cluster must be; without --cluster, a cluster of this kind is chosen.",
)  # fmt: skip
@click.option(
    "--follow", "follow_run", is_flag=True,
    help="Show progress until the run ends: exit 0, 100 failed, 103 cancelled.",
)  # fmt: skip
@click.option(
    "--allow-dirty", is_flag=True,
    help="To a cluster, from code that is not committed and pushed: store the patch in the run.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would happen; change nothing.")
@place_options
@output_option
def command(
    request: RunRequest,
    backend: str | None,
    follow_run: bool,
    allow_dirty: bool,
    dry_run: bool,
    place: Place,
    output_format: str,
) -> int:
    """Start a run of a preset, or adopt the one that exists.

    The same name with the same spec adopts the existing run: one under way is left alone; one that failed,
    was cancelled or lost its supervisor is started again with fresh retries; a complete one is done.
    The same name with another spec is refused with the difference, and nothing is changed.
    """
    profile = place.profile(backend)
    run = request.resolve(profile)
    require_nodes(profile, run)
    site = place.open(profile)
    plan = plan_submit(site, run)
    if plan.action.starts:
        if not site.local:
            plan = replace(plan, run=require_published(run, allow_dirty=allow_dirty))
            _note_unmet_needs(run)
        require_room(site, run, request_words(request))
    if dry_run:
        emit(
            output_format,
            _plan_document(plan) | {"spec": run.spec},
            lambda: _plan_lines(plan, request, site, allow_dirty=allow_dirty),
        )
        return int(ExitCode.OK)
    return submit(site, plan, follow_run=follow_run, output_format=output_format)


def _note_unmet_needs(run: RunSpec) -> None:
    from launcher.kubernetes_values import unmet_needs

    for line in unmet_needs(run):
        note(f"note: {line}")


def submit(site: Site, plan: Plan, *, follow_run: bool, output_format: str) -> int:
    """Carry out a plan and report; returns the exit code."""
    run = plan.run.run
    started = carry_out(site, plan)
    if follow_run:
        note(plan.sentence)
        return _follow(site, run, output_format)
    status = run_status(site, run)
    document = _plan_document(plan) | {"started": started, "status": status.to_dict()}
    emit(output_format, document, lambda: _started_lines(plan, status, site, started=started))
    return int(ExitCode.OK)


def _follow(site: Site, run: str, output_format: str) -> int:
    try:
        status = follow(lambda: run_status(site, run), LastLogLine(site.backend.read_log))
    except KeyboardInterrupt:
        watch, stop = site.suggest("status", run, "--watch"), site.suggest("cancel", run)
        note(f"run {run} goes on; `{watch}` shows it, `{stop}` stops it")
        return int(ExitCode.INTERRUPTED)
    emit(output_format, status.to_dict(), lambda: detail_lines(status))
    return int(status.exit_code)


def request_words(request: RunRequest) -> list[str]:
    """The options that make this request again."""
    return ["--preset", request.preset, *_settings_words(request), *_name_words(request)]


def _settings_words(request: RunRequest) -> list[str]:
    words = [word for overlay in request.overlays for word in ("--overlay", overlay)]
    words += [word for setting in request.sets for word in ("--set", setting)]
    words += [word for folder in request.jobs_dirs for word in ("--jobs", str(folder))]
    return words


def _name_words(request: RunRequest) -> list[str]:
    words = ["--name", request.name] if request.name else []
    return words + (["--suffix", request.suffix] if request.suffix else [])


def _plan_document(plan: Plan) -> dict[str, object]:
    return {
        "run": plan.run.run,
        "action": plan.action.value,
        "message": plan.sentence,
        "run_dir": plan.run_dir,
        "storage": plan.storage,
        "spec_hash": plan.run.spec_hash,
        "wandb": plan.run.wandb,
    }


def _plan_lines(plan: Plan, request: RunRequest, site: Site, *, allow_dirty: bool) -> list[str]:
    spec = suggest("presets", "show", request.preset, *_settings_words(request))
    if not site.local:  # whose profile has a part in it
        patch = ["--allow-dirty"] if allow_dirty else []
        spec = suggest("render", *request_words(request), *patch, *site.profile.options)
    verb = "would start it" if plan.action.starts else "would start nothing"
    return [
        f"{plan.sentence}; submit {verb}",
        *([f"directory: {where}"] if (where := plan.run_dir or plan.storage) else []),
        f"spec hash: {plan.run.spec_hash}",
        f"see the spec: {spec}",
        "dry run: nothing was changed",
    ]


def _started_lines(plan: Plan, status: RunStatus, site: Site, *, started: bool) -> list[str]:
    lines = [plan.sentence]
    if started:
        lines.append("started; it goes on without this terminal")
    elif plan.action.starts:
        lines.append("another submit started it at the same time")
    lines.append(f"state:     {status.state} ({status.reason})")
    if where := status.run_dir or status.storage:
        lines.append(f"directory: {where}")
    if plan.action is Action.COMPLETE:
        return [*lines, f"next:      {status.advice}"]
    return [
        *lines,
        f"watch:     {site.suggest('status', status.run, '--watch')}",
        f"stop:      {site.suggest('cancel', status.run)}",
    ]
