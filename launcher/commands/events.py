"""``launcher events``: what happened to a run, as its backend tells it."""

from __future__ import annotations

import click

from launcher.commands.explain import event_line
from launcher.commands.options import Place, output_option, place_options
from launcher.errors import ExitCode
from launcher.lifecycle import run_status
from launcher.output import emit, note
from launcher.rundir_errors import run_dir_errors
from launcher.story import event_dict


@click.command("events", epilog="Exit codes: 0 done, 2 usage, 5 backend out of reach, 102 no such run.")
@click.argument("run")
@click.option("--warnings", "warnings_only", is_flag=True, help="Leave out what is no warning.")
@place_options
@output_option
def command(run: str, warnings_only: bool, place: Place, output_format: str) -> int:
    """List what happened to RUN, the oldest first: its supervisor's journal, or the cluster's events.

    A cluster forgets its events after a while, often after an hour. `launcher explain` puts what matters of
    them beside the attempts.
    """
    site = place.open()
    status = run_status(site, run)
    with run_dir_errors():
        events = [event for event in site.backend.events(run) if event.warning or not warnings_only]
    if not events and output_format == "text":
        note(f"no events of {run} are known (any more); it is {status.state} ({status.reason})")
    emit(
        output_format,
        [event_dict(event) for event in events],
        lambda: [f"{'warning' if event.warning else '       '}  {event_line(event)}" for event in events],
    )
    return int(ExitCode.OK)
