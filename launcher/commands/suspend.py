"""``launcher suspend``: let a run give its machines back, to go on later."""

from __future__ import annotations

import click

from launcher.commands.options import Place, output_option, place_options, timeout_option
from launcher.commands.order import ordered
from launcher.errors import BackendError, ExitCode
from launcher.lifecycle import run_status
from launcher.output import emit
from launcher.states import State


@click.command("suspend", epilog="Exit codes: 0 done, 2 usage, 5 backend, 102 no such run, 130 interrupted.")
@click.argument("run")
@timeout_option
@place_options
@output_option
def command(run: str, timeout_s: float | None, place: Place, output_format: str) -> int:
    """Stop RUN with its grace period so that `launcher resume` lets it go on from its checkpoint.

    The stop is not charged to the limit of retries. Repeating it does no harm; a run that has ended stays as
    it ended.
    """
    site = place.open()
    before = run_status(site, run)
    if before.state is State.UNKNOWN and before.settled:
        raise BackendError(f"run '{run}' cannot be suspended: {before.reason}")
    if not ordered(site, "suspend", run, timeout_s):
        return int(ExitCode.INTERRUPTED)
    after = run_status(site, run)
    if after.state is not State.SUSPENDED and not after.state.terminal:
        raise BackendError(
            f"run '{run}' is not suspended yet: {after.state} ({after.reason})",
            why="the request stands and is carried out as soon as possible",
            next_step=site.suggest("status", run),
        )
    changed = after.state is State.SUSPENDED and before.state is not State.SUSPENDED

    def plain() -> list[str]:
        if after.state.terminal:
            return [f"{run}: already {after.state} ({after.reason}); nothing to suspend"]
        told = "suspended" if changed else "was suspended already"
        return [f"{run}: {told}", f"next: {site.suggest('resume', run)}"]

    emit(output_format, after.to_dict() | {"changed": changed}, plain)
    return int(ExitCode.OK)
