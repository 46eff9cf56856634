"""Code that nobody else has: refused, or stored as a patch that makes it again."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from influence.rundir import RunSpec
from influence.rundir.spec import canonical_json
from launcher.backends.run_document import MAX_BYTES
from launcher.errors import SpecError, UsageError
from launcher.git import code_version, published_commit
from launcher.working_tree import require_published, stored_patch
from tests.launcher.test_spec_git import checkout, git

__all__ = ["checkout"]


@pytest.fixture
def published(checkout: Path, tmp_path: Path) -> Path:
    """A checkout whose commit is on a remote branch."""
    remote = tmp_path / "remote.git"
    git(tmp_path, "init", "-q", "--bare", str(remote))
    git(checkout, "remote", "add", "origin", str(remote))
    git(checkout, "push", "-q", "origin", "HEAD:main")
    return checkout


def run_of(top: Path) -> RunSpec:
    spec = {"code": code_version(top).as_dict(), "cluster": {"image": "registry/infl:1"}}
    return RunSpec.new("infl-x-0221", spec)


def change(top: Path, text: str = "a = 2\n") -> None:
    (top / "influence" / "code.py").write_text(text)


def applied(top: Path, run: RunSpec, folder: Path) -> Path:
    """The patch of a run, applied to a fresh clone of what it is based on."""
    text = stored_patch(run.provenance)
    assert text is not None
    clone = folder / "clone"
    git(folder, "clone", "-q", str(top), str(clone))
    git(clone, "checkout", "-q", run.provenance["patch"]["base"])
    subprocess.run(["git", "-C", str(clone), "apply", "-"], input=text, check=True, capture_output=True)
    return clone


def test_published_code_passes_as_it_is(published: Path) -> None:
    run = run_of(published)
    assert require_published(run, allow_dirty=False, top=published) is run
    assert require_published(run, allow_dirty=True, top=published) is run


def test_an_installed_package_passes(tmp_path: Path) -> None:
    run = run_of(tmp_path)  # no repository
    assert run.spec["code"]["git_commit"] is None
    assert require_published(run, allow_dirty=False, top=None) is run


def test_changed_files_are_refused_and_told(published: Path) -> None:
    change(published)
    with pytest.raises(UsageError) as caught:
        require_published(run_of(published), allow_dirty=False, top=published)
    assert "differs from its commit" in caught.value.what
    assert "registry/infl:1" in str(caught.value.why)
    assert "--allow-dirty" in str(caught.value.next_step)


def test_a_commit_that_was_not_pushed_is_refused(published: Path) -> None:
    base = git(published, "rev-parse", "HEAD")
    change(published)
    git(published, "commit", "-qam", "mine")
    assert published_commit(published) == base
    with pytest.raises(UsageError, match="is on no remote branch"):
        require_published(run_of(published), allow_dirty=False, top=published)
    git(published, "push", "-q", "origin", "HEAD:other")
    run = run_of(published)
    assert require_published(run, allow_dirty=False, top=published) is run


def test_without_a_remote_nothing_is_published(checkout: Path) -> None:
    assert published_commit(checkout) is None
    with pytest.raises(UsageError, match="is on no remote branch"):
        require_published(run_of(checkout), allow_dirty=False, top=checkout)
    # There is nothing to compare with; the commit is named in the spec.
    assert "patch" not in require_published(run_of(checkout), allow_dirty=True, top=checkout).provenance


def test_the_patch_makes_the_same_code_again(published: Path, tmp_path: Path) -> None:
    """Commits that were not pushed, changes on top of them, new and deleted files, bytes that are no text."""
    base = git(published, "rev-parse", "HEAD")
    (published / "influence" / "old.py").write_text("old\n")
    git(published, "add", "-A")
    git(published, "commit", "-qm", "mine")
    change(published, "a = 3\n")
    (published / "influence" / "old.py").unlink()
    (published / "influence" / "new.py").write_text("b = 'ü'\n")
    (published / "influence" / "data.bin").write_bytes(bytes(range(256)))
    (published / "notes.txt").write_text("no part of the code\n")
    for key, value in (("diff.noprefix", "true"), ("color.ui", "always"), ("diff.external", "false")):
        git(published, "config", key, value)
    index_before = (published / ".git" / "index").read_bytes()
    before = run_of(published)
    run = require_published(before, allow_dirty=True, top=published)
    assert run.provenance["patch"]["base"] == base
    assert (run.spec_hash, run.run) == (before.spec_hash, before.run)
    clone = applied(published, run, tmp_path)
    for name in ("code.py", "new.py", "data.bin"):
        assert (clone / "influence" / name).read_bytes() == (published / "influence" / name).read_bytes()
    assert not (clone / "influence" / "old.py").exists()
    assert not (clone / "notes.txt").exists()
    assert (published / ".git" / "index").read_bytes() == index_before
    assert require_published(before, allow_dirty=True, top=published) == run, "equal trees, equal patches"


def test_a_patch_that_is_too_large_is_refused(published: Path) -> None:
    import random

    noise = random.Random(7).randbytes(MAX_BYTES)  # does not compress
    (published / "influence" / "data.bin").write_bytes(noise)
    with pytest.raises(SpecError, match="too large to be stored in the run") as caught:
        require_published(run_of(published), allow_dirty=True, top=published)
    assert str(MAX_BYTES) in caught.value.what
    (published / "influence" / "data.bin").write_bytes(noise[: MAX_BYTES // 4])
    run = require_published(run_of(published), allow_dirty=True, top=published)
    assert len(canonical_json(run.to_dict())) <= MAX_BYTES


def test_a_secret_in_the_patch_is_refused_and_not_repeated(published: Path) -> None:
    secret = "hf_" + "a1B2" * 8
    change(published, f"x = '{secret}'\n")
    with pytest.raises(
        SpecError, match=r"patch of influence/code\.py holds what looks like a secret"
    ) as caught:
        require_published(run_of(published), allow_dirty=True, top=published)
    assert secret not in f"{caught.value.what} {caught.value.why} {caught.value.next_step}"
    change(published, "token = token or read_token()\n")  # code about tokens is none
    assert require_published(run_of(published), allow_dirty=True, top=published).provenance["patch"]


def test_a_run_without_a_patch_has_none() -> None:
    assert stored_patch({}) is None
    assert replace(run_of(Path("/nonexistent")), provenance={}).provenance == {}
