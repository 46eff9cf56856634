"""Which version of the code runs: the package's version and, in a source checkout, git's state."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Mapping
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
        diff_sha256: over the files that differ and the untracked code; None where clean.
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


def published_commit(top: Path) -> str | None:
    """The latest commit on the way back from HEAD that a remote branch holds, as far as is known here.

    None where there is none: no remote, or nothing of this history was ever fetched or pushed.
    """
    unpublished = _git(top, "rev-list", "--first-parent", "HEAD", "--not", "--remotes")
    if unpublished is None:
        return None
    commits = unpublished.decode("ascii", "replace").split()
    found = _git(top, "rev-parse", "--verify", "--quiet", f"{commits[-1]}^" if commits else "HEAD")
    return None if found is None else found.decode("ascii", "replace").strip()


def patch(top: Path, base: str) -> bytes:
    """What turns the commit ``base`` into the tree as it is, untracked code included; for ``git apply``.

    The user's index is left alone, and the user's settings do not change the form.
    """
    untracked = _git(top, "ls-files", "--others", "--exclude-standard", "-z", "--", *CODE_PATHS) or b""
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        _git(top, "read-tree", "HEAD", extra=index)
        if untracked:
            names = ("--pathspec-from-file=-", "--pathspec-file-nul")
            _git(top, "add", "--intent-to-add", *names, extra=index, given=untracked)
        forms = ("--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--binary", "--unified=3")
        prefixes = ("--src-prefix=a/", "--dst-prefix=b/")
        return _git(top, "diff", *forms, *prefixes, base, extra=index) or b""


def _difference(top: Path) -> str | None:
    """A SHA-256 over the files that differ from HEAD; None where none does.

    Names and contents are hashed, not the text of ``git diff``, which depends on the user's settings.
    """
    changed = _git(top, "diff", "--name-only", "--no-renames", "--no-ext-diff", "-z", "HEAD") or b""
    untracked = _git(top, "ls-files", "--others", "--exclude-standard", "-z", "--", *CODE_PATHS) or b""
    names = sorted({name for name in (changed + untracked).split(b"\0") if name})
    if not names:
        return None
    digest = hashlib.sha256()
    for name in names:
        digest.update(name + b"\0" + _content(top / os.fsdecode(name)) + b"\0")
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    """What is at a path now, in one digest: gone, a link and its target, or a file's mode and bytes."""
    try:
        if path.is_symlink():
            return b"link" + hashlib.sha256(os.fsencode(path.readlink())).digest()
        executable = bool(path.stat().st_mode & stat.S_IXUSR)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").digest()
        return (b"executable" if executable else b"file") + digest
    except OSError:
        return b"gone"


def _git(top: Path, *args: str, extra: Mapping[str, str] | None = None, given: bytes = b"") -> bytes | None:
    """git's standard output; None where git is missing, fails or hangs.

    Args:
        extra: further variables of its environment.
        given: its standard input.
    """
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(  # noqa: S603 - fixed words and a path, no shell
            ["git", "-C", str(top), "-c", "core.fsmonitor=false", *args],  # noqa: S607 - the user's own git
            capture_output=True,
            check=True,
            timeout=TIMEOUT_S,
            env={**env, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C", **(extra or {})},
            input=given,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
