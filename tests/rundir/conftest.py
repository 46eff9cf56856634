from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from influence.rundir import RunPaths, claim_attempt

from .steps import commit, new_run


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run that has been created and never started."""
    return new_run(tmp_path)


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that commit hundreds of times and pull no plug."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def committed_run(paths: RunPaths) -> Path:
    """The directory of a run with step 1 committed."""
    commit(paths, claim_attempt(paths), 1)
    return paths.root_dir


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path]:
    """A mounted filesystem of 64 KiB."""
    mount_point = tmp_path / "mount"
    mount_point.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount_point)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("this user cannot mount")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True)
