"""Whether an image fits this code, as far as its reference, its labels and the tools here can tell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.doctor import Check
from launcher.git import CodeVersion
from launcher.image import (
    PLATFORM,
    REVISION_LABEL,
    VERSION_LABEL,
    image_version,
    revision,
    tag_version,
)
from launcher.image_reference import ImageReference
from launcher.secrets import redacted

TIMEOUT_S = 30.0
_TOO_OLD = ("unknown flag", "unknown command", "docker: 'buildx' is not a docker command")


@dataclass(frozen=True, slots=True)
class Labels:
    """An image's labels, or why nobody could read them."""

    labels: Mapping[str, str] | None
    told_by: str
    """The tool that answered, or what each one that was asked said."""


def image_checks(image: ImageReference, code: CodeVersion, labels: Labels) -> Iterator[Check]:
    """What agrees and what does not, each on its own.

    ``failed`` is said of another version of the package only. Another commit of the same version is a
    warning: a run's spec names the launcher's commit, and its pod runs the image's.
    """
    yield pinned(image)
    yield from _tag(image, code)
    yield from _labels(image, code, labels)


def version_is_known(checks: Sequence[Check]) -> bool:
    """Whether any check could compare the version."""
    return any(check.name in ("tag", "version label") and check.outcome != "unknown" for check in checks)


def pinned(image: ImageReference) -> Check:
    """Whether the reference names one image for ever."""
    if image.digest:
        return Check(name="digest", outcome="ok", detail="the reference names one image for ever")
    return Check(
        name="digest",
        outcome="warning",
        detail="a tag can move to another image; a spec's hash holds the reference, not what it points to",
        next_step=f"write cluster.image: {image}@sha256:... with the digest that the push printed",
    )


def _tag(image: ImageReference, code: CodeVersion) -> Iterator[Check]:
    told = tag_version(image.tag) if image.tag else None
    if told is None:
        words = f"the tag {image.tag} names no version" if image.tag else "the reference has no tag"
        yield Check(name="tag", outcome="unknown", detail=words)
    elif told.version != image_version(code):
        yield _other_version("tag", told.version, code)
    elif told.other is not None:
        words = f"the tag {image.tag} names version {told.version}, and '{told.other}' is no commit"
        yield Check(name="tag", outcome="unknown", detail=words)
    elif told.commit is None:
        yield Check(name="tag", outcome="ok", detail=f"version {told.version}; it names no commit")
    elif code.git_commit is None:
        yield Check(
            name="tag", outcome="ok", detail=f"version {told.version}; this code's commit is not known"
        )
    elif not code.git_commit.startswith(told.commit) or told.dirty != bool(code.dirty):
        yield _other_commit("tag", told.commit + ("-dirty" if told.dirty else ""), code)
    else:
        yield Check(name="tag", outcome="ok", detail=f"version {told.version}, commit {told.commit}")


def _labels(image: ImageReference, code: CodeVersion, answer: Labels) -> Iterator[Check]:
    if answer.labels is None:
        yield Check(
            name="version label",
            outcome="unknown",
            detail=f"the image's labels could not be read: {answer.told_by}",
            next_step="install skopeo, crane or docker, and log in to the registry with it",
        )
        return
    version, commit = answer.labels.get(VERSION_LABEL), answer.labels.get(REVISION_LABEL)
    if not version:
        yield Check(
            name="version label",
            outcome="unknown",
            detail=f"{answer.told_by}: the image has no label {VERSION_LABEL}; it is not of our Dockerfile",
            next_step=f"`launcher image --image {image.repository}` prints how to build one that has",
        )
    elif version != code.version:
        yield _other_version("version label", version, code)
    else:
        yield Check(name="version label", outcome="ok", detail=f"{answer.told_by}: version {version}")
    if version == code.version and commit and code.git_commit is not None:
        if commit == revision(code):
            yield Check(name="revision label", outcome="ok", detail=f"{answer.told_by}: commit {commit}")
        else:
            yield _other_commit("revision label", commit, code)


def _other_version(name: str, version: str, code: CodeVersion) -> Check:
    return Check(
        name=name,
        outcome="failed",
        detail=f"the image is of version {version}, this code of {code.version}",
        next_step="set cluster.image to an image of this version; `launcher image` prints how to build it",
    )


def _other_commit(name: str, commit: str, code: CodeVersion) -> Check:
    return Check(
        name=name,
        outcome="warning",
        detail=f"the image was built from {commit}, the spec would name {revision(code)}",
        next_step="check out that commit, or build an image of this one: `launcher image`",
    )


def read_labels(image: ImageReference) -> Labels:
    """Ask the registry, else this machine, with whichever tool is here; credentials are the tool's own.

    The registry goes first: under a tag, this machine may hold another image than a cluster would pull.
    """
    name = image.pull_name
    questions = (
        ("skopeo", ["inspect", "--config", f"docker://{name}"]),
        ("crane", ["config", name]),
        ("docker buildx", ["imagetools", "inspect", "--format", "{{json .Image}}", name]),
        ("docker", ["image", "inspect", "--format", "{{json .}}", name]),
    )
    refusals = []
    for tool, words in questions:
        program = shutil.which(tool.split()[0])
        if program is None:
            continue
        answer = _ask([program, *tool.split()[1:], *words])
        if isinstance(answer, str):
            refusals.append(f"{tool}: {answer}")
            continue
        where = "docker, on this machine" if tool == "docker" else f"{tool}, at the registry"
        return Labels(_labels_of(answer), where)
    return Labels(None, "; ".join(refusals) or "neither skopeo, crane nor docker is on PATH")


def _ask(command: Sequence[str]) -> dict[str, Any] | str:
    """A tool's JSON, or in one line why there is none."""
    try:
        done = subprocess.run(  # noqa: S603 - a list of words, no shell
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            check=False,
            env=os.environ,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT_S:.0f} s"
    except OSError as error:
        return error.strerror or type(error).__name__
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip()
        if words.startswith(_TOO_OLD):
            return "the version that is installed here cannot read labels; a newer one can"
        return redacted(words.splitlines()[0])[:200] if words else f"exit code {done.returncode}"
    try:
        document = json.loads(done.stdout)
    except ValueError:
        return "its answer is no JSON"
    return document if isinstance(document, dict) else "its answer is no JSON object"


def _labels_of(document: Mapping[str, Any]) -> Mapping[str, str]:
    """The labels in an image's configuration; of a multi-platform image those of linux/amd64."""
    document = document.get(PLATFORM, document)
    config = document.get("config") or document.get("Config") or {}
    labels = config.get("Labels") if isinstance(config, dict) else None
    return {str(key): str(value) for key, value in labels.items()} if isinstance(labels, dict) else {}
