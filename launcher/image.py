"""The trainer's image: its tags, and the command that builds the one of this code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UsageError
from launcher.git import CodeVersion
from launcher.image_reference import ImageReference

VERSION_LABEL = "org.opencontainers.image.version"
REVISION_LABEL = "org.opencontainers.image.revision"
PLATFORM = "linux/amd64"  # what constraints-image.txt was resolved for
_COMMIT_DIGITS = 12
_OUR_TAG = re.compile(
    r"v?(?P<version>[0-9][^-]*)(-((?P<commit>[0-9a-f]{7,40})(?P<dirty>-dirty)?|(?P<other>.+)))?"
)


@dataclass(frozen=True, slots=True)
class TagVersion:
    """What a tag in the form that we give says about the image's code."""

    version: str
    commit: str | None
    """The first digits of the git commit."""
    dirty: bool
    other: str | None = None
    """What stands in the place of the commit and is none."""


def image_tag(code: CodeVersion) -> str:
    """The tag of an image of this code: ``0.1.0-0123456789ab``, with ``-dirty`` where the tree differs."""
    version = re.sub(r"[^A-Za-z0-9_.]", "_", code.version)
    if code.git_commit is None:
        return version
    return f"{version}-{code.git_commit[:_COMMIT_DIGITS]}{'-dirty' if code.dirty else ''}"


def tag_version(tag: str) -> TagVersion | None:
    """What the tag says; None for one that is not in our form, such as ``latest``."""
    match = _OUR_TAG.fullmatch(tag)
    return match and TagVersion(match["version"], match["commit"], match["dirty"] is not None, match["other"])


def image_version(code: CodeVersion) -> str:
    """The code's version as a tag spells it, which knows no ``+``."""
    return image_tag(CodeVersion(version=code.version, git_commit=None, dirty=None, diff_sha256=None))


def revision(code: CodeVersion) -> str:
    """The label that says which commit an image was built from."""
    if code.git_commit is None:
        return "unknown"
    return f"{code.git_commit}-dirty" if code.dirty else code.git_commit


def build_command(
    image: ImageReference, code: CodeVersion, checkout: Path | None, *, push: bool
) -> Sequence[str]:
    """The words of the command that builds the image of this code, and pushes it where asked to.

    Args:
        image: its repository is used; its tag and digest are those of some other image.
        checkout: the top of the source tree, the build's context.

    Raises:
        UsageError: the launcher runs from an installed wheel, which holds no Dockerfile.
    """
    if checkout is None or not (checkout / "Dockerfile").is_file():
        raise UsageError(
            "launcher image: there is no Dockerfile here to build from",
            why="the launcher runs from an installed package, not from its source tree",
            next_step="git clone the project and run `python -m launcher image` at its top",
        )
    return [
        *("docker", "buildx", "build", "--platform", PLATFORM),
        *("--build-arg", f"VERSION={code.version}"),
        *("--build-arg", f"REVISION={revision(code)}"),
        *("--tag", f"{image.repository}:{image_tag(code)}"),
        "--push" if push else "--load",
        str(checkout),
    ]
