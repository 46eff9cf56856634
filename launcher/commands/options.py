"""Options that several commands share, spelled once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.places import DEFAULT_RESULTS, DEFAULT_ROOT, RESULTS_VARIABLE, ROOT_VARIABLE
from launcher.profiles import CLUSTER_VARIABLE, CONFIG_VARIABLE, Profile, choose_profile

if TYPE_CHECKING:
    from launcher.site import Site

output_option = click.option(
    "--output", "-o", "output_format", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="Plain lines, or one JSON document.",
)  # fmt: skip

timeout_option = click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0), metavar="SECONDS",
    help="How long to wait for the end; by default the run's grace period and a minute.",
)  # fmt: skip

results_option = click.option(
    "--results", "results_dir", type=click.Path(file_okay=False, path_type=Path), default=DEFAULT_RESULTS,
    envvar=RESULTS_VARIABLE, show_default=True, show_envvar=True, help="The folder for collected copies.",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the user wants a command to work, unresolved."""

    cluster: str | None = None
    config: Path | None = None
    root: Path | None = None

    def profile(self, backend: str | None = None, *, offline: bool = False) -> Profile:
        """The profile that is meant; takes and raises what ``choose_profile`` does."""
        return choose_profile(self.cluster, self.config, backend, offline=offline)

    def with_root(self, profile: Profile) -> Profile:
        """The profile with the folder that was given by flag, if one was."""
        return profile if self.root is None else replace(profile, root=self.root)

    def open(self, profile: Profile | None = None) -> Site:
        """The place itself; raises as ``profile`` and ``Site.open`` do.

        Args:
            profile: where it was chosen before.
        """
        from launcher.site import Site

        return Site.open(self.profile() if profile is None else profile, self.root)


cluster_option = click.option(
    "--cluster", metavar="NAME", envvar=CLUSTER_VARIABLE, show_envvar=True,
    help="Where the run executes: a cluster of launcher.yaml; local: this machine; kubernetes, kuberay: the "
    "cluster of the kubeconfig's current context.",
)  # fmt: skip

config_option = click.option(
    "--config", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
    help=f"Read this launcher.yaml alone.  [env var: {CONFIG_VARIABLE}]",
)  # fmt: skip


def place_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that say where it works; it receives them as ``place: Place``."""

    @functools.wraps(command)
    def with_place(cluster: str | None, config: Path | None, root: Path | None, **others: Any) -> Any:
        return command(place=Place(cluster=cluster, config=config, root=root), **others)

    options = (
        cluster_option,
        config_option,
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
