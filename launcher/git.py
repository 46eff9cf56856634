"""Which version of the code runs: the package's version and, in a source checkout, git's state."""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher import __version__
from launcher.resources import checkout_dir

TIMEOUT_S = 20.0
#: What an untracked file must lie in to change a run; anything else (notes, outputs) is not part of the code.
CODE_PATHS = ("influence", "launcher", "templates")


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeVersion:
    """The code of a run, as the spec holds it.

    Attributes:
        version: of the distribution.
        git_commit: the commit that is checked out; None outside a git checkout.
        dirty: whether the tree differs from the commit; None outside a git checkout.
        diff_sha256: of the difference (``git diff`` of tracked files, and untracked code); None where clean.
    """

    version: str
    git_commit: str | None
    dirty: bool | None
    diff_sha256: str | None

    def as_dict(self) -> dict[str, str | bool | None]:
        return asdict(self)


def code_version(top: Path | None = None) -> CodeVersion:
    """The version of the code at ``top``, by default of the code that runs.

    An installed wheel may lie inside somebody's repository (a ``.venv``), whose commit says nothing about
    it: git is asked only where ``top`` is itself the top of a repository.
    """
    top = checkout_dir() if top is None else top
    unknown = CodeVersion(version=__version__, git_commit=None, dirty=None, diff_sha256=None)
    if top is None:
        return unknown
    inside = _git(top, "rev-parse", "--show-toplevel", "HEAD")
    if inside is None:
        return unknown
    shown, _, commit = inside.decode(errors="surrogateescape").strip().rpartition("\n")
    if Path(shown).resolve() != top.resolve():
        return unknown
    difference = _difference(top)
    return CodeVersion(
        version=__version__,
        git_commit=commit,
        dirty=difference is not None,
        diff_sha256=difference,
    )


def _difference(top: Path) -> str | None:
    """The SHA-256 of all that differs from HEAD; None where nothing does."""
    diff = (
        _git(top, "diff", "--binary", "--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "HEAD")
        or b""
    )
    listed = _git(top, "ls-files", "--others", "--exclude-standard", "-z", "--", *CODE_PATHS) or b""
    untracked = sorted(name for name in listed.split(b"\0") if name)
    if not diff and not untracked:
        return None
    digest = hashlib.sha256(diff)
    for name in untracked:
        path = top / os.fsdecode(name)
        try:
            content = path.read_bytes() if not path.is_symlink() else os.fsencode(path.readlink())
        except OSError:
            content = b""
        digest.update(b"\0" + name + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def _git(top: Path, *args: str) -> bytes | None:
    """git's standard output; None where git is missing, fails or hangs."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(  # noqa: S603 - fixed words and a path, no shell
            ["git", "-C", str(top), "-c", "core.fsmonitor=false", *args],  # noqa: S607 - the user's own git
            capture_output=True,
            check=True,
            timeout=TIMEOUT_S,
            env={**env, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
