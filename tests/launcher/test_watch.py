"""Watching a cluster's runs while its server goes away and comes back."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import progress
from launcher.commands import logs, status, submit
from launcher.commands.options import Place
from launcher.group import run as run_launcher
from launcher.lifecycle import plan_submit, run_status
from launcher.progress import LastLogLine
from launcher.site import Site
from launcher.states import Phase
from tests.launcher.fake_backend import fake_site
from tests.launcher.local_run import REPOSITORY
from tests.launcher.test_site import RUN, server, some_run, submitted
from tests.own_time import give_own_time


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    made = submitted(fake_site())
    server(made).becomes(RUN, Phase.EXECUTING, "the trainer runs")
    monkeypatch.setattr(Place, "open", lambda *_: made)
    return made


def scripted(monkeypatch: pytest.MonkeyPatch, *happens: Callable[[], object]) -> None:
    """Instead of waiting, let one thing happen after the other."""
    script = iter(happens)

    def sleep(_: float) -> None:
        happening = next(script, None)
        assert happening is not None, "it should have ended by now"
        happening()

    for module in (progress, status, logs):
        give_own_time(monkeypatch, module, sleep=sleep)


def away_and_back(site: Site, *, polls: int = 3) -> list[Callable[[], object]]:
    backend = server(site)

    def away() -> None:
        backend.reachable = False

    def back() -> None:
        backend.reachable = True

    ends = [back, lambda: backend.becomes(RUN, Phase.COMPLETED, "all steps committed")]
    return [away, *itertools.repeat(lambda: None, polls), *ends]


def test_following_a_submit_survives_the_server(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, *away_and_back(site))
    plan = plan_submit(site, some_run())
    assert submit.submit(site, plan, follow_run=True, output_format="text") == 0
    captured = capsys.readouterr()
    assert "state:     SUCCEEDED" in captured.out
    states = [line.split()[2] for line in captured.err.splitlines() if line[:2].isdigit()]
    assert states == ["RUNNING", "UNKNOWN", "RUNNING", "SUCCEEDED"]  # each told once


@pytest.mark.parametrize("option", ["--watch", "--wait"])
def test_watching_one_run(
    site: Site, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(monkeypatch, *away_and_back(site))
    assert run_launcher(["status", RUN, option]) == 0
    captured = capsys.readouterr()
    assert "SUCCEEDED" in captured.out
    assert captured.err.count("the server did not answer") == (1 if option == "--watch" else 0)


def test_watching_all_runs(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server(site).submit(some_run("infl-done-0221"))
    server(site).becomes("infl-done-0221", Phase.COMPLETED, "done before")
    scripted(monkeypatch, *away_and_back(site))
    assert run_launcher(["status", "--watch"]) == 0
    captured = capsys.readouterr()
    unknown = [line for line in captured.err.splitlines() if "UNKNOWN" in line]
    assert len(unknown) == 1, "told once, and not of a run that has ended"
    assert unknown[0].startswith(RUN)
    assert captured.out.count("SUCCEEDED") == 2


def test_without_watching_a_server_that_does_not_answer_is_an_error(
    site: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    server(site).reachable = False
    assert run_launcher(["status", "--output", "json"]) == 5
    assert json.loads(capsys.readouterr().out)["what"] == "the server did not answer"
    assert run_launcher(["status", RUN, "--output", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "UNKNOWN"
    assert run_launcher(["status", RUN, "--wait", "--timeout", "0"]) == 101


def test_a_followed_log_goes_on_where_it_was_cut_off(
    site: Site, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through an outage and a retry, no byte twice and none lost."""
    backend = server(site)
    backend.logs[(RUN, 1)] = b"one\n"

    def more(attempt: int, text: bytes) -> Callable[[], object]:
        def write() -> None:
            backend.logs[(RUN, attempt)] = backend.logs.get((RUN, attempt), b"") + text

        return write

    away, *waiting, back, done = away_and_back(site)
    scripted(
        monkeypatch, away, more(1, b"two\n"), *waiting, back, more(1, b"three\n"), more(2, b"four\n"), done
    )
    assert run_launcher(["logs", RUN, "-f"]) == 0
    captured = capfd.readouterr()
    assert captured.out == "one\ntwo\nthree\nfour\n"
    assert captured.err.count("cut off: the server did not answer") == 1
    assert "-- attempt 2 --" in captured.err


def test_the_last_line_of_a_log_is_kept_while_nobody_answers(site: Site) -> None:
    server(site).logs[(RUN, 1)] = b"one\ntwo\n"
    last = LastLogLine(site.backend.read_log)
    shown = replace(run_status(site, RUN), attempt=1)
    assert last(shown) == "two"
    server(site).reachable = False
    assert last(shown) == "two"


def test_links_to_wandb_stand_in_the_table(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_launcher(["status"]) == 0
    assert f"https://wandb.ai/e/p/runs/{RUN}" in capsys.readouterr().out


def test_collect_needs_the_run_directories(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_launcher(["collect", "--run", RUN]) == 5
    told = capsys.readouterr().err
    assert "not reachable from here" in told
    assert "clusters.lab.root" in told


@pytest.mark.parametrize(
    ("command", "phase", "words"),
    [
        ("suspend", Phase.SUSPENDED, "suspended"),
        ("cancel", Phase.CANCELLED, "cancelled; committed steps are kept"),
    ],
)
def test_orders_to_a_cluster(
    site: Site, command: str, phase: Phase, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_launcher([command, RUN]) == 0
    assert words in capsys.readouterr().out
    assert server(site).objects[RUN][-1].phase is phase
    if command == "suspend":
        assert run_launcher(["suspend", RUN]) == 0
        assert "was suspended already" in capsys.readouterr().out
        assert run_launcher(["resume", RUN]) == 0
        assert "resumed; PENDING" in capsys.readouterr().out
        assert run_launcher(["resume", RUN, "--output", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["changed"] is False


def test_an_order_that_is_not_carried_out_in_time_is_told(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = server(site)
    monkeypatch.setattr(backend, "suspend", lambda run, timeout_s: backend.becomes(run, Phase.STOPPING))
    assert run_launcher(["suspend", RUN, "--timeout", "0"]) == 5
    told = capsys.readouterr().err
    assert "is not suspended yet: TERMINATING" in told
    assert f"launcher status {RUN} --cluster lab" in told


def test_status_of_this_machine_imports_no_client(tmp_path: Path) -> None:
    """Also where a project describes clusters, as long as this machine is named."""
    (tmp_path / "launcher.yaml").write_text("clusters: {lab: {backend: kubernetes}}\n")
    code = (
        "import sys; from launcher.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted({'pydantic', 'kubernetes', 'httpx', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "status", "--cluster", "local", "--output", "json"],
        cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY), "HOME": "/nonexistent"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "[]\n[]\n"
