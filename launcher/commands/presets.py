"""``launcher presets``: what there is, and what one resolves to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.commands.options import output_option
from launcher.commands.preset_options import jobs_option, overlay_option, set_option
from launcher.output import emit, table

if TYPE_CHECKING:
    from launcher.presets import PresetFile, PresetLibrary


@click.group(epilog="Exit codes: 0 done, 2 usage, 3 invalid preset.")
def command() -> None:
    """List presets and overlays, or show one resolved."""


@command.command("list", epilog="Exit codes: 0 done, 2 usage, 3 a file that is no YAML.")
@jobs_option
@output_option
def list_presets(jobs_dirs: tuple[Path, ...], output_format: str) -> None:
    """List presets and overlays: your own folders' first, then the shipped ones."""
    from launcher.presets import PresetLibrary

    library = PresetLibrary(jobs_dirs)
    document = {
        "presets": _described(library, library.presets()),
        "overlays": _described(library, library.overlays()),
    }

    def plain() -> list[str]:
        lines = []
        for title, entries in document.items():
            rows = [[entry["name"], entry["file"], entry["description"]] for entry in entries]
            lines += [*table([title.upper(), "FILE", "DESCRIPTION"], rows), ""]
        return [*lines, "launcher presets show NAME prints one resolved."]

    emit(output_format, document, plain)


def _described(library: PresetLibrary, files: list[PresetFile]) -> list[dict[str, str]]:
    return [{"name": f.name, "file": f.label, "description": library.describe(f)} for f in files]


@command.command("show", epilog="Exit codes: 0 done, 2 unknown preset or overlay, 3 invalid preset.")
@click.argument("preset", metavar="NAME")
@overlay_option
@set_option
@jobs_option
@output_option
def show_preset(
    preset: str,
    overlays: tuple[str, ...],
    sets: tuple[str, ...],
    jobs_dirs: tuple[Path, ...],
    output_format: str,
) -> None:
    """Show every setting of a preset (a name, or a YAML file) after `extends`, overlays and --set."""
    from launcher.presets import PresetLibrary

    resolved = PresetLibrary(jobs_dirs).resolve(preset, overlays, sets)
    document = {"preset": resolved.preset, "overlays": list(resolved.overlays), "settings": resolved.settings}

    def plain() -> list[str]:
        from launcher.yaml_source import dump_yaml

        return dump_yaml(resolved.settings).rstrip("\n").split("\n")

    emit(output_format, document, plain)
