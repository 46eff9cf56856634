"""The code version: of a real repository made for the test, of a wheel, and without git."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from launcher import __version__, resources
from launcher.git import CodeVersion, code_version

UNKNOWN = CodeVersion(version=__version__, git_commit=None, dirty=None, diff_sha256=None)


def git(folder: Path, *args: str) -> str:
    identity = {
        f"GIT_{who}_{what}": f"{who}@example.com"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    done = subprocess.run(
        ["git", "-C", str(folder), *args],
        check=True,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **identity},
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    top = tmp_path / "project"
    (top / "influence").mkdir(parents=True)
    (top / "influence" / "code.py").write_text("a = 1\n")
    (top / ".gitignore").write_text("runs/\n__pycache__/\n")
    git(top, "init", "-q")
    git(top, "add", "-A")
    git(top, "commit", "-qm", "first")
    return top


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert code_version(checkout) == CodeVersion(
        version=__version__, git_commit=head, dirty=False, diff_sha256=None
    )


def test_each_difference_of_the_code_has_a_hash_of_its_own(checkout: Path) -> None:
    code = checkout / "influence" / "code.py"
    seen = set()
    for text in ("a = 2\n", "a = 3\n"):
        code.write_text(text)
        version = code_version(checkout)
        assert version.dirty
        assert version == code_version(checkout), "the same tree has the same version"
        seen.add(version.diff_sha256)
    git(checkout, "add", "-A")
    assert code_version(checkout).diff_sha256 in seen, "staged or not is no difference"
    (checkout / "influence" / "new.py").write_text("b = 1\n")
    seen.add(code_version(checkout).diff_sha256)
    (checkout / "influence" / "new.py").write_text("b = 2\n")
    seen.add(code_version(checkout).diff_sha256)
    assert len(seen) == 4
    git(checkout, "reset", "-q", "--hard")
    code.chmod(0o755)
    seen.add(code_version(checkout).diff_sha256)
    code.unlink()
    seen.add(code_version(checkout).diff_sha256)
    assert len(seen) == 6
    assert all(digest and len(digest) == 64 for digest in seen)
    git(checkout, "reset", "-q", "--hard")
    (checkout / "influence" / "new.py").unlink()
    assert code_version(checkout).dirty is False


def test_outputs_and_notes_are_no_part_of_the_code(checkout: Path) -> None:
    (checkout / "runs").mkdir()
    (checkout / "runs" / "x").write_text("1")
    (checkout / "notes.txt").write_text("1")
    (checkout / "influence" / "__pycache__").mkdir()
    (checkout / "influence" / "__pycache__" / "code.pyc").write_text("1")
    assert code_version(checkout).dirty is False


def test_links_and_unreadable_names_do_not_stop_it(checkout: Path) -> None:
    (checkout / "influence" / "dangling").symlink_to("nowhere")
    (checkout / "influence" / os.fsdecode(b"caf\xe9.py")).write_text("1")
    assert code_version(checkout).dirty is True


def test_a_wheel_inside_somebodys_repository_has_no_commit(checkout: Path) -> None:
    site = checkout / ".venv" / "site-packages"
    site.mkdir(parents=True)
    assert code_version(site) == UNKNOWN


def test_no_git_no_repository_no_commit(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert code_version(tmp_path) == UNKNOWN
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "-q")
    assert code_version(empty) == UNKNOWN
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert code_version(checkout) == UNKNOWN


def test_the_users_git_settings_do_not_change_the_hash(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "influence" / "code.py").write_text("a = 2\n")
    plain = code_version(checkout)
    for key, value in (
        ("diff.noprefix", "true"),
        ("diff.mnemonicPrefix", "true"),
        ("color.ui", "always"),
        ("diff.context", "0"),
        ("diff.external", "false"),
        ("core.abbrev", "40"),
        ("diff.algorithm", "patience"),
    ):
        git(checkout, "config", key, value)
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "false")
    assert code_version(checkout) == plain


def test_an_installed_wheel_is_known_by_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "_data"
    (data / "jobs").mkdir(parents=True)
    monkeypatch.setattr(resources, "_DATA", data)
    assert resources.checkout_dir() is None
    assert resources.shipped_jobs_dir() == data / "jobs"
    assert resources.templates_dir() == data / "templates"
    assert code_version() == UNKNOWN


def test_this_checkout_is_recognised() -> None:
    assert resources.checkout_dir() == Path(__file__).resolve().parents[2]
    assert (resources.shipped_jobs_dir() / "base.yaml").is_file()
    assert (resources.templates_dir() / "kubernetes" / "job.yaml.j2").is_file()
