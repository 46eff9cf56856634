"""``launcher resume``: let a suspended run go on."""

from __future__ import annotations

import click

from launcher.commands.options import Place, output_option, place_options
from launcher.errors import BackendError, ExitCode
from launcher.lifecycle import run_status
from launcher.output import emit
from launcher.rundir_errors import run_dir_errors
from launcher.states import State


@click.command("resume", epilog="Exit codes: 0 done, 2 usage, 5 backend, 102 no such run.")
@click.argument("run")
@place_options
@output_option
def command(run: str, place: Place, output_format: str) -> int:
    """Let RUN go on after `launcher suspend`, from its latest checkpoint and with the retries that it had.

    A run that is not suspended is left alone; one that has ended is started again by `launcher submit`.
    """
    site = place.open()
    before = run_status(site, run)
    after = before
    # Suspended, perhaps, with every step committed: then nothing is left to do.
    if before.state is not State.SUCCEEDED:
        with run_dir_errors():
            site.backend.resume(run)
        after = run_status(site, run)
    if after.state is State.SUSPENDED:
        raise BackendError(
            f"run '{run}' is still suspended: {after.reason}", next_step=site.suggest("explain", run)
        )
    changed = before.state is State.SUSPENDED

    def plain() -> list[str]:
        if changed:
            return [
                f"{run}: resumed; {after.state} ({after.reason})",
                f"watch: {site.suggest('status', run, '--watch')}",
            ]
        told = [f"{run}: is {after.state} ({after.reason}); nothing to resume"]
        return [*told, f"next: {after.advice}"] if after.advice else told

    emit(output_format, after.to_dict() | {"changed": changed}, plain)
    return int(ExitCode.OK)
