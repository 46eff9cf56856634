"""``launcher image``: how the trainer's image is built, and whether one fits this code."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from launcher.commands.options import Place, cluster_option, config_option, output_option
from launcher.commands.preset_options import jobs_option, overlay_option, set_option
from launcher.errors import ExitCode, SpecError, UsageError
from launcher.image_reference import ImageReference
from launcher.output import emit, note


@click.command(
    epilog="Exit codes: 0 done (with --check: the versions agree), 2 usage or unknown preset, 3 invalid"
    " preset or an image of another version, 5 nothing could tell the image's version."
)
@click.option(
    "--image",
    "image_text",
    metavar="REFERENCE",
    help="The image; by default cluster.image of the preset and the cluster.",
)
@click.option(
    "--preset", default="base", show_default=True, metavar="NAME", help="A preset by name, or a YAML file."
)
@overlay_option
@set_option
@jobs_option
@cluster_option
@config_option
@click.option("--check", is_flag=True, help="Compare the image with this code instead.")
@click.option("--push", is_flag=True, help="Print the command that pushes, too.")
@output_option
def command(
    image_text: str | None,
    preset: str,
    overlays: tuple[str, ...],
    sets: tuple[str, ...],
    jobs_dirs: tuple[Path, ...],
    cluster: str | None,
    config: Path | None,
    check: bool,
    push: bool,
    output_format: str,
) -> int:
    """Print the command that builds the image of this code, or check one.

    The tag is the package's version and git's commit. Nothing is built or pushed.

    --check compares the reference's tag, and the image's labels where skopeo, crane or docker can read them,
    with the version and commit that a run submitted from here would name.
    """
    if check and push:
        raise UsageError("--check and --push exclude each other", why="--push is a part of the build command")
    if image_text is not None:
        image = _parsed(image_text)
    else:
        from launcher.presets import PresetLibrary

        site = Place(cluster=cluster, config=config).profile().layer()
        resolved = PresetLibrary(jobs_dirs).resolve(preset, overlays, sets, site=site)
        image = _of_settings(resolved.settings)
    return _check(image, output_format) if check else _build(image, push, output_format)


def _parsed(text: str) -> ImageReference:
    try:
        return ImageReference.parse(text)
    except ValueError as error:
        raise UsageError(f"--image: {error}") from None


def _of_settings(settings: dict[str, Any]) -> ImageReference:
    try:
        return ImageReference.parse(settings["cluster"]["image"])
    except ValueError as error:
        raise SpecError(
            f"cluster.image: {error}", next_step="set it in your launcher.yaml or by --set"
        ) from None


def _build(image: ImageReference, push: bool, output_format: str) -> int:
    from launcher.git import code_version
    from launcher.image import build_command, image_tag
    from launcher.resources import checkout_dir

    code = code_version()
    words = list(build_command(image, code, checkout_dir(), push=push))
    built = ImageReference(image.repository, image_tag(code))
    if code.dirty:
        note("note: the tree differs from its commit; an image for others is better built from a clean one")
    if code.git_commit is None:
        note("note: no git commit is known here, so the tag names the version alone")
    document: dict[str, Any] = {"image": str(built), "command": words, "code": code.as_dict()}
    emit(output_format, document, lambda: [shlex.join(words)])
    if output_format == "text":
        note(f"then set cluster.image: {built}@sha256:... with the digest that the registry gives it")
    return int(ExitCode.OK)


def _check(image: ImageReference, output_format: str) -> int:
    from dataclasses import asdict

    from launcher.git import code_version
    from launcher.image_checks import image_checks, read_labels, version_is_known

    code = code_version()
    checks = list(image_checks(image, code, read_labels(image)))
    exit_code = ExitCode.OK
    if any(check.outcome == "failed" for check in checks):
        exit_code = ExitCode.SPEC
    elif not version_is_known(checks):
        exit_code = ExitCode.BACKEND
    document = {
        "image": str(image),
        "code": code.as_dict(),
        "checks": [asdict(check) for check in checks],
        "exit_code": int(exit_code),
    }

    def plain() -> list[str]:
        lines = [f"{image}, for version {code.version}:"]
        for check in checks:
            lines.append(f"  {check.outcome:<8} {check.name}: {check.detail}")
            if check.next_step:
                lines.append(f"  {'':<8} -> {check.next_step}")
        if exit_code is ExitCode.BACKEND:
            lines.append("Nothing here could tell the image's version.")
        return lines

    emit(output_format, document, plain)
    return int(exit_code)
