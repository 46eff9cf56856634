"""Whether the code that a run names can be had by anybody else; and if not, the patch that makes it.

A pod runs the code that its image holds. A run that names a commit which nobody else has, or files that were
changed after it, names code that could not be found again. The patch in the run's provenance makes up for it;
it does not reach the image.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from influence.rundir.spec import RunSpec, canonical_json
from launcher.backends.run_document import MAX_BYTES
from launcher.errors import SpecError, UsageError
from launcher.git import patch, published_commit
from launcher.resources import checkout_dir
from launcher.secrets import holds_secret


@dataclass(frozen=True, slots=True)
class _Gap:
    """What separates the code here from what is published."""

    top: Path
    words: str
    base: str
    """The commit that the patch applies to: the latest published one, else the one that is checked out."""


def require_published(run: RunSpec, *, allow_dirty: bool, top: Path | None = None) -> RunSpec:
    """Refuse a run whose code only this machine has, or store the patch in it.

    An installed package without git is fine: its version is on record.

    Args:
        allow_dirty: store the patch instead of refusing.
        top: the source tree; by default the one that this package is imported from.

    Returns:
        The run, with ``provenance["patch"]`` where a patch was needed: ``base``, the commit that it applies
        to, ``sha256`` of its text, and the text itself as ``gzip_base64``.

    Raises:
        UsageError: the code is not published.
        SpecError: the patch holds a secret, or is too large for the run document.
    """
    gap = _gap(run, checkout_dir() if top is None else top)
    if gap is None:
        return run
    if not allow_dirty:
        raise UsageError(
            f"{gap.words}; a cluster run is not submitted from it",
            why=f"the pod runs the code of its image, {run.spec['cluster']['image']}, and nobody could tell "
            "later which code the run names",
            next_step="commit and push, and build the image from that; or submit with --allow-dirty, which "
            "stores the patch in the run (and does not change the image)",
        )
    text = patch(gap.top, gap.base)
    if not text:
        return run
    _refuse_secrets(text)
    packed = {
        "base": gap.base,
        "sha256": hashlib.sha256(text).hexdigest(),
        "gzip_base64": base64.b64encode(gzip.compress(text, mtime=0)).decode(),
    }
    patched = replace(run, provenance={**run.provenance, "patch": packed})
    size = len(canonical_json(patched.to_dict()))
    if size > MAX_BYTES:
        raise SpecError(
            f"the patch of {gap.top} is too large to be stored in the run: the run document would take "
            f"{size} bytes, and {MAX_BYTES} is the most",
            why="it travels to the pod in an environment variable",
            next_step="commit and push instead",
        )
    return patched


def stored_patch(provenance: dict[str, Any]) -> bytes | None:
    """The text of the patch in a run's provenance; None where there is none."""
    packed = provenance.get("patch")
    return None if packed is None else gzip.decompress(base64.b64decode(packed["gzip_base64"]))


def _gap(run: RunSpec, top: Path | None) -> _Gap | None:
    code = run.spec["code"]
    commit = code["git_commit"]
    if commit is None or top is None:
        return None
    published = published_commit(top)
    if code["dirty"]:
        return _Gap(top, f"the working tree {top} differs from its commit {commit[:12]}", published or commit)
    if published != commit:
        return _Gap(top, f"the commit {commit[:12]} of {top} is on no remote branch", published or commit)
    return None


def _refuse_secrets(text: bytes) -> None:
    file = ""
    for line in text.decode("utf-8", "replace").splitlines():
        if line.startswith("+++ "):
            file = line.removeprefix("+++ ").removeprefix("b/")
        elif line.startswith(("+", "-", " ")) and holds_secret(line[1:]):
            raise SpecError(
                f"the patch of {file} holds what looks like a secret, and a run is stored and shown",
                next_step="take it out of the working tree, or commit and push instead",
            )
