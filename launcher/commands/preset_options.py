"""The options that choose a run, and the request that they make."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.errors import UsageError

if TYPE_CHECKING:
    from influence.rundir.spec import RunSpec
    from launcher.profiles import Profile

jobs_option = click.option(
    "--jobs", "jobs_dirs", multiple=True, type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    envvar="INFL_JOBS", show_envvar=True,
    help="A folder of your own presets, searched before the shipped ones. Repeatable.",
)  # fmt: skip

overlay_option = click.option(
    "--overlay", "overlays", multiple=True, metavar="NAME",
    help="An overlay by name or path, e.g. tiny-cpu; later ones win. Repeatable.",
)  # fmt: skip

set_option = click.option(
    "--set", "sets", multiple=True, metavar="PATH=VALUE",
    help="One setting, e.g. training.total_steps=3, with the value in YAML; later ones win. Repeatable.",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What the user asked for, unresolved.

    Attributes:
        preset, overlays, sets, name, suffix, jobs_dirs: as ``launcher.spec.resolve_run`` takes them.
        named: whether the user named a preset; else it is what every preset starts from.
    """

    preset: str
    overlays: tuple[str, ...]
    sets: tuple[str, ...]
    name: str | None
    suffix: str | None
    jobs_dirs: tuple[Path, ...]
    named: bool = True

    def resolve(self, profile: Profile) -> RunSpec:
        """The run for a place; raises as ``launcher.spec.resolve_run`` does. Imports pydantic and YAML."""
        from launcher.spec import resolve_run

        return resolve_run(
            self.preset,
            self.overlays,
            self.sets,
            self.name,
            self.suffix,
            jobs_dirs=self.jobs_dirs,
            profile=profile,
        )


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that choose a run; it receives them as ``request: RunRequest``."""
    return _with_options(command, required=True)


def optional_run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same options for a command that can do without: then ``request`` is that of the preset ``base``."""
    return _with_options(command, required=False)


def _with_options(command: Callable[..., Any], *, required: bool) -> Callable[..., Any]:
    @functools.wraps(command)
    def with_request(
        preset: str | None,
        overlays: tuple[str, ...],
        sets: tuple[str, ...],
        name: str | None,
        suffix: str | None,
        jobs_dirs: tuple[Path, ...],
        **others: Any,
    ) -> Any:
        if preset is None:
            if overlays or sets or name or suffix:
                raise UsageError("--overlay, --set, --name and --suffix go with --preset")
            preset, named = "base", False
        else:
            named = True
        request = RunRequest(
            preset=preset, overlays=overlays, sets=sets, name=name, suffix=suffix, jobs_dirs=jobs_dirs,
            named=named,
        )  # fmt: skip
        return command(request=request, **others)

    options = (
        click.option("--preset", required=required, metavar="NAME", help="A preset by name, or a YAML file."),
        overlay_option,
        set_option,
        click.option("--name", metavar="NAME", help="The run's name: a DNS label of at most 34 characters."),
        click.option(
            "--suffix", metavar="TEXT",
            help="The end of the run's name, by default the date (MMDD); 'hash': of the spec, 4 digits.",
        ),
        jobs_option,
    )  # fmt: skip
    decorated: Callable[..., Any] = with_request
    for option in reversed(options):
        decorated = option(decorated)
    return decorated
