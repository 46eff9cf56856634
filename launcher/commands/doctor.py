"""``launcher doctor``: whether a place has what runs need."""

from __future__ import annotations

from dataclasses import asdict

import click

from launcher.commands.options import Place, output_option, place_options
from launcher.commands.preset_options import RunRequest, optional_run_options
from launcher.doctor import Check, examine, summary
from launcher.errors import ExitCode
from launcher.output import emit
from launcher.profiles import LOCAL


@click.command(
    "doctor", epilog="Exit codes: 0 done, 2 usage, 3 invalid preset or launcher.yaml, 5 a check failed."
)
@optional_run_options
@place_options
@output_option
def command(request: RunRequest, place: Place, output_format: str) -> int:
    """Check a cluster's profile, or this machine, against the real thing, and say what to do about failures.

    On a cluster that includes its claim, Secret, queue and GPU nodes, as --preset asks for them, or else as
    every preset does. On this machine --preset says what the run needs of it. Nothing is changed.
    """
    profile = place.profile()
    run = request.resolve(profile) if request.named or profile.backend != LOCAL else None
    checks = list(examine(place.with_root(profile), run))
    failed = [check for check in checks if check.outcome == "failed"]
    document = {"cluster": profile.name, "ok": not failed, "checks": [asdict(check) for check in checks]}
    emit(output_format, document, lambda: _lines(checks, profile.name))
    return int(ExitCode.BACKEND if failed else ExitCode.OK)


def _lines(checks: list[Check], cluster: str) -> list[str]:
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.outcome:<7}  {check.name:<{width}}  {check.detail}")
        if check.next_step and check.outcome != "ok":
            lines.append(f"{'':7}  {'':{width}}  next: {check.next_step}")
    return [*lines, f"{cluster}: {summary(checks)}"]
