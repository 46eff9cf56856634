from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from influence.rundir import RunPaths, committed_steps, list_attempts, missing_steps, read_run, verify_step
paths = RunPaths.at(sys.argv[1])
read_run(paths), list_attempts(paths), missing_steps(paths, 3)
assert [verify_step(paths, record).status for record in committed_steps(paths).values()] == ["ok"]
print(*sorted(sys.modules))
"""
HEAVY = {"numpy", "zipfile", "ctypes", "torch", "verl", "pydantic", "yaml", "socket", "subprocess", "logging"}


def test_what_a_status_needs_imports_nothing_heavy(committed_run: Path) -> None:
    modules = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(committed_run)], check=True, capture_output=True, text=True
    ).stdout.split()
    assert "influence.rundir.lineage" in modules
    assert not HEAVY.intersection(modules)
    ours = [name for name in modules if name.startswith("influence.")]
    assert all(name.startswith("influence.rundir") for name in ours)
