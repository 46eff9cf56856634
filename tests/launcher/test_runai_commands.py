"""The launcher's own commands at a Run:ai site, and what they print: never a secret, `--debug` or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.group import run as run_launcher
from tests.launcher.runai_stub import PROJECT, Fault, RunaiStub
from tests.launcher.test_runai_client import ENVIRONMENT, assert_no_secrets, no_proxies, stub

__all__ = ["no_proxies", "stub"]

NAME = "infl-cli"
JOB = ("--preset", "smoke", "--overlay", "tiny-cpu", "--name", NAME)
Launcher = Callable[..., tuple[int, str]]


@pytest.fixture
def launcher(
    stub: RunaiStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Launcher]:
    """Runs a command line; returns the exit code and everything that was printed."""
    (tmp_path / "launcher.yaml").write_text(
        "default_cluster: lab\n"
        f"clusters: {{lab: {{backend: runai, runai: {{url: '{stub.url}', project: {PROJECT}}}}}}}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFL_CONFIG", "launcher.yaml")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    printed: list[str] = []

    def launch(*words: str) -> tuple[int, str]:
        code = run_launcher(["--debug", *words])
        shown = "".join(capfd.readouterr())
        printed.append(shown)
        return code, shown

    yield launch
    assert_no_secrets(stub, *printed)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert_no_secrets(stub, path.read_text(errors="replace"))


def test_a_run_from_doctor_to_cancel(stub: RunaiStub, launcher: Launcher) -> None:
    code, text = launcher("doctor", *JOB)
    assert code == 0, text
    assert "right to create trainings" in text
    code, text = launcher("submit", *JOB, "--allow-dirty")
    assert code == 0, text
    (workload,) = stub.live()
    assert (workload["name"], workload["projectName"]) == (NAME, PROJECT)
    stub.set_phase(NAME, "Running", pods=1)
    assert launcher("submit", *JOB, "--allow-dirty")[0] == 0
    code, text = launcher("submit", *JOB, "--allow-dirty", "--set", "training.seed=7")
    assert code == 4
    assert "training.seed: 0 -> 7" in text
    code, text = launcher("status", "--output", "json")
    assert code == 0
    (listed,) = json.loads(text)
    assert (listed["run"], listed["state"]) == (NAME, "RUNNING")
    assert launcher("suspend", NAME)[0] == 0
    assert "SUSPENDED" in launcher("status", NAME)[1]
    assert launcher("resume", NAME)[0] == 0
    for words in (("events", NAME), ("explain", NAME)):
        assert launcher(*words)[0] == 0
    code, text = launcher("logs", NAME)
    assert code == 5
    assert "set root in cluster 'lab'" in text
    assert launcher("cancel", NAME)[0] == 0
    assert "CANCELLED" in launcher("status", NAME)[1]
    assert len(stub.workloads) == 1


@pytest.mark.parametrize(
    ("kind", "method", "part", "told"),
    [
        ("403", "POST", "/trainings", "create and delete trainings"),
        ("401", "GET", "", "refuses the token"),
        ("html", "GET", "", "not JSON"),
        ("shape", "POST", "/token", "no accessToken"),
        ("302", "GET", "/projects", "to another address"),
    ],
)
def test_trouble_is_told_in_words(
    stub: RunaiStub, launcher: Launcher, kind: str, method: str, part: str, told: str
) -> None:
    stub.faults.append(Fault(kind, method=method, part=part, times=99))
    code, text = launcher("submit", *JOB, "--allow-dirty")
    assert code == 5
    assert told in text
    assert "this is a bug" not in text
    assert not stub.workloads


@pytest.mark.parametrize("variable", list(ENVIRONMENT))
def test_missing_credentials_are_named(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.delenv(variable)
    for words in (("status",), ("submit", *JOB, "--allow-dirty"), ("doctor",)):
        code, text = launcher(*words)
        assert code != 0
        assert f"{variable} is not set" in text


def test_an_answer_that_is_lost_does_not_make_a_second_training(stub: RunaiStub, launcher: Launcher) -> None:
    stub.faults.append(Fault("502", after=True, method="POST", part="/trainings"))
    assert launcher("submit", *JOB, "--allow-dirty")[0] == 0
    assert launcher("submit", *JOB, "--allow-dirty")[0] == 0
    assert len(stub.workloads) == 1


def test_render_asks_nobody(stub: RunaiStub, launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name)
    code, text = launcher("render", *JOB)
    assert code == 0, text
    training: dict[str, Any] = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert training["projectId"] == "<looked up at submit>"
    assert not stub.requests
