"""Helm, as the tests of the chart use it: built once from its Go module, or the one that INFL_HELM names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "charts" / "influence"
UNAVAILABLE = 69  # scripts/controlplane.py: no Go here

Helm = Callable[..., subprocess.CompletedProcess[str]]


def built(what: str) -> Path:
    """The path of what ``scripts/controlplane.py`` builds or fetches; skips the test where it cannot."""
    done = subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "controlplane.py", what],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode == UNAVAILABLE:
        pytest.skip(f"{what} is built with Go, which is not here")
    assert done.returncode == 0
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Runs helm with settings of its own: no user's repositories, no user's cluster."""
    named = os.environ.get("INFL_HELM")
    binary = named or str(built("helm"))
    assert shutil.which(binary), f"INFL_HELM={binary} is no program"
    home = tmp_path_factory.mktemp("helm")
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "KUBECONFIG": str(home / "none")}

    def run(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [binary, *words], env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


def template_words(chart: Path = CHART, values: Sequence[Path] = ()) -> list[str | Path]:
    """``helm template`` of one release that every golden file shows."""
    words: list[str | Path] = [
        "template",
        "infl",
        chart,
        "--namespace",
        "research",
        "--kube-version",
        "1.31.0",
    ]
    for file in values:
        words += ["--values", file]
    return words
