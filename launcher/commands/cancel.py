"""``launcher cancel``: stop a run and everything it started."""

from __future__ import annotations

import click

from launcher.commands.options import Place, output_option, place_options, timeout_option
from launcher.commands.order import ordered
from launcher.errors import BackendError, ExitCode
from launcher.lifecycle import run_status
from launcher.output import emit, note
from launcher.states import State


@click.command("cancel")
@click.argument("run")
@timeout_option
@place_options
@output_option
def command(run: str, timeout_s: float | None, place: Place, output_format: str) -> int:
    """Stop RUN for good, with its grace period, and wait until none of its processes is left.

    Committed steps are kept. Repeating it does no harm; a run that has ended stays as it ended. To go on
    with a cancelled run, submit it again.
    """
    site = place.open()
    before = run_status(site, run)
    if before.state is State.UNKNOWN and before.settled:
        raise BackendError(f"run '{run}' cannot be cancelled: {before.reason}")
    if before.state is State.UNKNOWN:
        how = "the request is sent all the same"
        if site.local:
            how = f"the request is left in {before.run_dir} for it, and its end awaited"
        note(f"{run}: {before.reason}; {how}")
    if not ordered(site, "cancel", run, timeout_s):
        return int(ExitCode.INTERRUPTED)
    after = run_status(site, run)
    if not after.state.terminal:
        raise BackendError(
            f"run '{run}' has not ended yet: {after.state} ({after.reason})",
            why="the request to cancel stands and is carried out as soon as possible",
            next_step=site.suggest("status", run, "--wait"),
        )
    changed = after.state is State.CANCELLED and before.state is not State.CANCELLED

    def plain() -> list[str]:
        if changed:
            kept = "committed steps are kept"
            if after.total_steps is not None:
                kept = f"{after.steps_committed} of {after.total_steps} steps are committed and kept"
            return [f"{run}: cancelled; {kept}"]
        return [f"{run}: already {after.state} ({after.reason}); nothing to cancel"]

    emit(output_format, after.to_dict() | {"changed": changed}, plain)
    return int(ExitCode.OK)
