"""``launcher logs``: which attempt, following through retries, and what reaches a terminal."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from influence.rundir import claim_attempt
from launcher.backends.local import LocalBackend
from launcher.commands import logs
from launcher.commands.options import Place
from launcher.errors import ExitCode
from launcher.group import run as run_launcher
from launcher.states import Phase
from tests.launcher.fake_backend import fake_site
from tests.launcher.local_run import GENEROUS_S, LocalRun, launcher, python_path, wait_for
from tests.launcher.test_site import RUN, server, submitted
from tests.own_time import give_own_time


@pytest.fixture
def two_attempts(local_run: LocalRun) -> LocalRun:
    """Two attempts with a log each, and nothing that runs."""
    local_run.order(["exit 0"])
    for text in ("say one\nexit 3\n", "say two\n"):
        attempt = claim_attempt(local_run.paths)
        local_run.paths.log(attempt.number).write_text(text)
    return local_run


def test_the_latest_attempt_by_default_and_another_on_request(two_attempts: LocalRun) -> None:
    latest = launcher("logs", two_attempts.name, root=two_attempts.root)
    assert latest.returncode == 0
    assert latest.stdout.encode() == two_attempts.paths.log(2).read_bytes()
    first = launcher("logs", two_attempts.name, "--attempt", "1", root=two_attempts.root)
    assert first.stdout.encode() == two_attempts.paths.log(1).read_bytes()
    assert "say one" in first.stdout


def test_an_attempt_that_is_not_there(two_attempts: LocalRun) -> None:
    done = launcher("logs", two_attempts.name, "--attempt", "7", root=two_attempts.root)
    assert done.returncode == 102
    assert "there are 1, 2" in done.stderr
    assert launcher("logs", "infl-none-0221", root=two_attempts.root).returncode == 102


def test_a_run_without_an_attempt_says_where_to_look(local_run: LocalRun) -> None:
    local_run.order(["raw-exit 64"]).start().wait_settled()
    done = launcher("logs", local_run.name, root=local_run.root)
    assert done.returncode == 0
    assert done.stdout == ""
    assert "supervisor.log" in done.stderr


@pytest.mark.slow
def test_follow_goes_through_retries_and_ends_with_the_run(local_run: LocalRun) -> None:
    local_run.order(["say one", "hang"], ["say two", "commit 1", "commit 2", "exit 0"]).start()
    local_run.wait_for_log("hang")
    follower = subprocess.Popen(
        [sys.executable, "-m", "launcher", "logs", local_run.name, "-f", "--root", str(local_run.root)],
        env={**os.environ, "PYTHONPATH": python_path()}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        bufsize=0,
    )  # fmt: skip
    assert follower.stdout is not None
    assert follower.stdout.readline() == b"attempt 1 begins\n"
    os.kill(local_run.pids("starts")[0], signal.SIGTERM)
    out, err = follower.communicate(timeout=GENEROUS_S)
    assert follower.returncode == 0
    both = local_run.paths.log(1).read_bytes() + local_run.paths.log(2).read_bytes()
    assert b"attempt 1 begins\n" + out == both
    assert b"-- attempt 2 --" in err


@pytest.mark.slow
def test_follow_of_one_attempt_ends_with_it(local_run: LocalRun) -> None:
    local_run.order(["say one", "exit 3"], ["hang"]).start()
    local_run.wait_for_log("hang", attempt=2)
    done = launcher("logs", local_run.name, "-f", "--attempt", "1", root=local_run.root)
    assert done.returncode == 0
    assert "say one" in done.stdout
    assert "hang" not in done.stdout


def test_json_is_an_object_a_line(two_attempts: LocalRun) -> None:
    done = launcher("logs", two_attempts.name, "--output", "json", root=two_attempts.root)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"attempt": 2, "line": "say two"}]


def test_bytes_go_unchanged_into_a_pipe_and_escaped_to_a_terminal(two_attempts: LocalRun) -> None:
    hostile = b"a\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2J \xff\xfe \xc2\x9b31m\r\n10%\r20%\rlast"
    two_attempts.paths.log(2).write_bytes(hostile)
    command = [sys.executable, "-m", "launcher", "logs", two_attempts.name, "--root", str(two_attempts.root)]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    piped = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert piped.stdout == hostile

    controller, terminal = pty.openpty()
    subprocess.run(command, env=environment, stdout=terminal, stderr=subprocess.PIPE, check=True)
    os.close(terminal)
    seen = b""
    try:
        while chunk := os.read(controller, 65536):
            seen += chunk
    except OSError:  # how Linux reports the other end's closing
        pass
    os.close(controller)
    lines = seen.decode().replace("\r\n", "\n").splitlines()
    assert lines == ["ared \\x1b]0;title\\x07 \\x1b[2J \ufffd\ufffd \\x9b31m", "10%", "20%", "last"]


def test_a_link_in_the_place_of_a_log_is_not_followed(two_attempts: LocalRun, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("do not print")
    two_attempts.paths.log(2).unlink()
    two_attempts.paths.log(2).symlink_to(secret)
    done = launcher("logs", two_attempts.name, root=two_attempts.root)
    assert "do not print" not in done.stdout
    assert done.returncode == 6
    assert "symbolic link" in done.stderr


def test_a_reader_that_goes_away_is_no_error(two_attempts: LocalRun) -> None:
    two_attempts.paths.log(2).write_bytes(b"line\n" * 400_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "logs", two_attempts.name, "--root", str(two_attempts.root)],
        env={**os.environ, "PYTHONPATH": python_path()}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.wait(timeout=GENEROUS_S) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


@given(text=st.text(alphabet="ab\u00e9\n\r", max_size=30), cuts=st.lists(st.integers(0, 60), max_size=6))
def test_lines_do_not_depend_on_how_the_stream_is_cut(text: str, cuts: list[int]) -> None:
    """Pieces may end inside a character or a line end; the lines are those of the whole."""
    data = text.encode()
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    lines: list[str] = []
    writer = logs._Lines(lambda _, line: lines.append(line))
    for begin, end in pairwise(places):
        writer(1, data[begin:end])
    writer(1, None)
    whole = io.StringIO(text, newline=None).read()  # universal newlines, by the standard library
    assert lines == (whole.removesuffix("\n").split("\n") if whole else [])


def test_an_endless_line_is_printed_in_pieces() -> None:
    seen: list[Any] = []
    writer = logs._Lines(lambda _, line: seen.append(len(line)))
    for _ in range(4):
        writer(1, b"x" * 50_000)
    assert sum(seen) >= 100_000
    wait_for(lambda: seen)


def test_a_run_that_may_not_be_read_is_the_backends_trouble(
    local_run: LocalRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local_run.order()

    def forbidden(*_: object) -> list[int]:
        raise PermissionError(errno.EACCES, "Permission denied", str(local_run.paths.attempts_dir))

    monkeypatch.setattr(LocalBackend, "attempts", forbidden)
    assert run_launcher(["logs", local_run.name, "--root", str(local_run.root)]) == ExitCode.BACKEND
    assert f"error: {local_run.paths.attempts_dir}: Permission denied" in capsys.readouterr().err


def test_following_a_run_that_waits_says_why_once_a_change(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    site = submitted(fake_site())
    backend = server(site)
    polls = iter(
        [
            lambda: backend.becomes(RUN, Phase.QUEUED, "its pod waits for the scheduler"),
            lambda: None,
            lambda: backend.becomes(RUN, Phase.QUEUED, "no node takes its pod"),
            lambda: None,
            lambda: backend.logs.update({(RUN, 1): b"hello\n"}),
            lambda: backend.becomes(RUN, Phase.COMPLETED),
        ]
    )
    monkeypatch.setattr(Place, "open", lambda *_: site)
    give_own_time(monkeypatch, logs, sleep=lambda _: next(polls)())
    assert run_launcher(["logs", RUN, "-f"]) == 0
    captured = capfd.readouterr()
    assert captured.out == "hello\n"
    told = [line.partition("PENDING")[2].rpartition(": ")[2] for line in captured.err.splitlines()]
    assert told == ["waits for a node", "its pod waits for the scheduler", "no node takes its pod"]
