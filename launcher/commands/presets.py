"""``launcher presets``: what there is, and what one resolves to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.commands.options import cluster_option, config_option, output_option
from launcher.commands.preset_options import jobs_option, overlay_option, set_option
from launcher.errors import SpecError
from launcher.output import emit, table
from launcher.profiles import choose_profile

if TYPE_CHECKING:
    from launcher.presets import PresetFile, PresetLibrary


@click.group(epilog="Exit codes: 0 done, 2 usage, 3 invalid preset.")
def command() -> None:
    """List presets and overlays, or show one resolved."""


@command.command("list", epilog="Exit codes: 0 done, 2 usage.")
@jobs_option
@output_option
def list_presets(jobs_dirs: tuple[Path, ...], output_format: str) -> None:
    """List presets and overlays: your own folders' first, then the shipped ones.

    A file that cannot be read is listed with its error.
    """
    from launcher.presets import PresetLibrary

    library = PresetLibrary(jobs_dirs)
    document = {
        "presets": _described(library, library.presets()),
        "overlays": _described(library, library.overlays()),
    }

    def plain() -> list[str]:
        lines = []
        for title, entries in document.items():
            rows = [
                [e["name"], e["file"], f"broken: {e['error']}" if e["error"] else e["description"]]
                for e in entries
            ]
            lines += [*table([title.upper(), "FILE", "DESCRIPTION"], rows), ""]
        return [*lines, "launcher presets show NAME prints one resolved."]

    emit(output_format, document, plain)


def _described(library: PresetLibrary, files: list[PresetFile]) -> list[dict[str, str]]:
    """One broken file hides none of the others: its entry has an error in place of a description."""
    entries: list[dict[str, str]] = []
    for file in files:
        entry: dict[str, str] = {"name": file.name, "file": file.label}
        try:
            entry |= {"description": library.describe(file), "error": ""}
        except SpecError as error:
            entry |= {"description": "", "error": error.what}
        entries.append(entry)
    return entries


@command.command("show", epilog="Exit codes: 0 done, 2 unknown preset or overlay, 3 invalid preset.")
@click.argument("preset", metavar="NAME")
@overlay_option
@set_option
@jobs_option
@cluster_option
@config_option
@output_option
def show_preset(
    preset: str,
    overlays: tuple[str, ...],
    sets: tuple[str, ...],
    jobs_dirs: tuple[Path, ...],
    cluster: str | None,
    config: Path | None,
    output_format: str,
) -> None:
    """Show every setting of a preset (a name, or a YAML file) after `extends`, overlays and --set.

    With --cluster the settings of that cluster in launcher.yaml are laid between the overlays and --set, as
    submit and render do; without it no cluster has a part in it.
    """
    from launcher.presets import PresetLibrary

    site = None if cluster is None else choose_profile(cluster, config, offline=True).layer()
    resolved = PresetLibrary(jobs_dirs).resolve(preset, overlays, sets, site=site)
    document = {"preset": resolved.preset, "overlays": list(resolved.overlays), "settings": resolved.settings}

    def plain() -> list[str]:
        from launcher.yaml_source import dump_yaml

        return dump_yaml(resolved.settings).rstrip("\n").split("\n")

    emit(output_format, document, plain)
