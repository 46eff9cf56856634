"""Options that several commands share, spelled once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.places import DEFAULT_RESULTS, DEFAULT_ROOT, RESULTS_VARIABLE, ROOT_VARIABLE
from launcher.profiles import LOCAL, Profile

if TYPE_CHECKING:
    from launcher.site import Site

output_option = click.option(
    "--output", "-o", "output_format", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="Plain lines, or one JSON document.",
)  # fmt: skip

results_option = click.option(
    "--results", "results_dir", type=click.Path(file_okay=False, path_type=Path), default=DEFAULT_RESULTS,
    envvar=RESULTS_VARIABLE, show_default=True, show_envvar=True, help="The folder for collected copies.",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the user wants a command to work, unresolved."""

    root: Path | None

    def profile(self) -> Profile:
        """The profile that is meant."""
        return Profile(name=LOCAL, backend=LOCAL)

    def open(self) -> Site:
        """The place itself; raises as ``profile`` and ``Site.open`` do."""
        from launcher.site import Site

        return Site.open(self.profile(), self.root)


def place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say where it works; it receives them as ``place: Place``."""

    @functools.wraps(command)
    def with_place(root: Path | None, **others: Any) -> Any:
        return command(place=Place(root=root), **others)

    options = (
        click.option(
            "--root", type=click.Path(file_okay=False, path_type=Path),
            help="The folder that holds the run directories.  "
            f"[default: {ROOT_VARIABLE}, else {DEFAULT_ROOT}; on a cluster the profile's root]",
        ),
    )  # fmt: skip
    decorated: Callable[..., Any] = with_place
    for option in reversed(options):
        decorated = option(decorated)
    return decorated
