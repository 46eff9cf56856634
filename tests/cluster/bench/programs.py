"""The built programs; ``scripts/controlplane.py`` builds them once and says where they are."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "scripts" / "controlplane.py"
_UNAVAILABLE = 69


class NoProgramError(Exception):
    """It is not there, and there is no Go to build it; the message says what to do."""


def controlplane() -> Path:
    """The binary that is etcd and Kubernetes."""
    return _built("controlplane")


def helm() -> Path:
    """The binary."""
    return _built("helm")


def crds(project: str) -> list[Path]:
    """The resource definitions of ``kuberay``, ``kueue`` or ``kai``, a file each."""
    files = sorted((_built("crds") / project).glob("*.yaml"))
    if not files:
        raise LookupError(f"no CRDs of {project}; tests/cluster/crds.json says which there are")
    return files


@functools.cache
def _built(name: str) -> Path:
    """
    Raises:
        NoProgramError: there is no Go.
        RuntimeError: the build failed.
    """
    done = subprocess.run([sys.executable, SCRIPT, name], capture_output=True, text=True, check=False)
    if done.returncode == _UNAVAILABLE:
        raise NoProgramError(done.stderr.strip())
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return Path(done.stdout.strip())
