"""``launcher status``: every run in the root, or one run in detail."""

from __future__ import annotations

import time
from dataclasses import replace

import click

from launcher.commands.options import Place, output_option, place_options
from launcher.errors import BackendError, ExitCode, UsageError
from launcher.lifecycle import run_status, run_statuses
from launcher.output import emit, note, one_line, table
from launcher.progress import age, follow, live_lines, progress_parts, wandb_line
from launcher.site import Site
from launcher.states import RunStatus, State

_WAIT_POLL_S = 0.5
_WATCH_POLL_S = 2.0


@click.command("status")
@click.argument("run", required=False)
@click.option("--watch", is_flag=True, help="Show changes until the run has ended, or Ctrl-C.")
@click.option(
    "--wait", is_flag=True, help="Wait for RUN to end: exit 0 succeeded, 100 failed, 103 cancelled."
)
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0), metavar="SECONDS",
              help="With --wait or --watch: stop then; exit 101 if RUN has not ended.")  # fmt: skip
@place_options
@output_option
def command(
    run: str | None, watch: bool, wait: bool, timeout_s: float | None, place: Place, output_format: str
) -> int:
    """Show the state of RUN, or of every run in the root.

    Progress is what the trainer has committed to the run directory. A state comes with its reason and,
    where a person can act, the next command.
    """
    site = place.open()
    if wait and run is None:
        raise UsageError(
            "--wait needs a RUN to wait for", next_step=f"{site.suggest('status')} (lists the runs)"
        )
    if timeout_s is not None and not (wait or watch):
        raise UsageError("--timeout goes with --wait or --watch")
    if run is None:
        return _all_runs(site, output_format, watch=watch, timeout_s=timeout_s)
    if watch:
        status = follow(lambda: run_status(site, run), poll_s=_WAIT_POLL_S, timeout_s=timeout_s)
    elif wait:
        status = _wait(site, run, timeout_s)
    else:
        status = run_status(site, run)
    emit(output_format, status.to_dict(), lambda: detail_lines(status))
    return int(status.exit_code if wait else ExitCode.OK)


def _wait(site: Site, run: str, timeout_s: float | None) -> RunStatus:
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        status = run_status(site, run)
        if status.settled or (deadline is not None and time.monotonic() >= deadline):
            return status
        time.sleep(_WAIT_POLL_S)


def _all_runs(site: Site, output_format: str, *, watch: bool, timeout_s: float | None) -> int:
    statuses = run_statuses(site)
    if watch and output_format == "text":
        statuses = _watch_all(site, statuses, timeout_s)
    if not statuses and output_format == "text":
        note(f"no runs in {site}; `{site.suggest('submit', '--preset', 'NAME')}` starts one")
        return int(ExitCode.OK)
    emit(output_format, [status.to_dict() for status in statuses], lambda: table_lines(statuses))
    return int(ExitCode.OK)


def _watch_all(site: Site, statuses: list[RunStatus], timeout_s: float | None) -> list[RunStatus]:
    """Show the table again and again, until every run has ended."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with live_lines() as show:
        while True:
            show([one_line(line) for line in table_lines(statuses)])
            late = deadline is not None and time.monotonic() >= deadline
            if late or all(status.settled for status in statuses):
                return statuses
            time.sleep(_WATCH_POLL_S)
            try:
                statuses = run_statuses(site)
            except BackendError as error:
                if site.local:
                    raise
                statuses = [status if status.settled else _unknown(status, error) for status in statuses]


def _unknown(status: RunStatus, error: BackendError) -> RunStatus:
    """A run as it was last seen, while the server does not answer; nothing but its state is forgotten."""
    return replace(
        status, state=State.UNKNOWN, reason=str(error), next_command=None, next_step=None, settled=False
    )


def table_lines(statuses: list[RunStatus]) -> list[str]:
    """One line a run."""
    headers = ["RUN", "STATE", "STEPS", "ATTEMPT", "LAST STEP", "W&B", "REASON"]
    rows = [
        [
            status.run,
            status.state,
            "-" if status.total_steps is None else f"{status.steps_committed}/{status.total_steps}",
            "-" if status.attempt is None else str(status.attempt),
            "-" if status.last_step_age_s is None else f"{age(status.last_step_age_s)} ago",
            status.wandb_url or "-",
            status.reason,
        ]
        for status in statuses
    ]
    if not any(status.wandb_url for status in statuses):
        for row in (headers, *rows):
            del row[5]
    return table(headers, rows, right=(2, 3))


def detail_lines(status: RunStatus) -> list[str]:
    """Everything about one run."""
    preset = " + ".join([status.preset or "-", *status.overlays])
    entries = [
        ("run", status.run),
        ("state", status.state.value),
        ("reason", status.reason),
        ("progress", ", ".join(progress_parts(status))),
        ("preset", preset),
        ("backend", status.backend),
        ("started", status.started_at),
        ("W&B", wandb_line(status)),
        ("directory", status.run_dir or status.storage),
        ("next", status.advice),
    ]
    return [f"{name + ':':<11}{value}" for name, value in entries if value]
