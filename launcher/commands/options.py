"""Options that several commands share, spelled once."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.places import DEFAULT_RESULTS, DEFAULT_ROOT, RESULTS_VARIABLE, ROOT_VARIABLE

output_option = click.option(
    "--output", "-o", "output_format", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="Plain lines, or one JSON document.",
)  # fmt: skip

root_option = click.option(
    "--root", type=click.Path(file_okay=False, path_type=Path), default=DEFAULT_ROOT, envvar=ROOT_VARIABLE,
    show_default=True, show_envvar=True, help="The folder that holds the run directories.",
)  # fmt: skip

results_option = click.option(
    "--results", "results_dir", type=click.Path(file_okay=False, path_type=Path), default=DEFAULT_RESULTS,
    envvar=RESULTS_VARIABLE, show_default=True, show_envvar=True, help="The folder for collected copies.",
)  # fmt: skip
