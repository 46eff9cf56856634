"""Helm, as the tests of the chart use it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.cluster.bench import programs

CHART = Path(__file__).resolve().parents[2] / "charts" / "influence"

Helm = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Runs helm with settings of its own: no user's repositories, no user's cluster."""
    try:
        binary = programs.helm()
    except programs.NoProgramError as error:
        pytest.skip(str(error))
    return run_helm(binary, tmp_path_factory.mktemp("helm"))


def run_helm(binary: Path, home: Path, kubeconfig: Path | None = None) -> Helm:
    """Helm as a function of its words; an error is an assertion's unless ``check=False``."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "KUBECONFIG": str(kubeconfig or home / "none"),
    }

    def run(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [binary, *words], env=environment, capture_output=True, text=True, check=False, timeout=120
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
