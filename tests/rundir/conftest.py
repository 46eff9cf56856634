from __future__ import annotations

import os
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
