"""What `--follow` and `--watch` show of a run."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from launcher.progress import LastLogLine, follow
from launcher.states import BackendFacts, Phase, RunFacts, RunStatus, derive


def status(attempt: int | None) -> RunStatus:
    facts = RunFacts(run="infl-x", run_dir="/runs/infl-x", total_steps=2, attempt=attempt)
    return derive(
        BackendFacts(backend="local", phase=Phase.EXECUTING, reason="the trainer runs"), facts, now_s=0.0
    )


def test_the_last_line_of_the_log_without_its_colours() -> None:
    logs = {1: b"", 2: b"second attempt\n"}
    last = LastLogLine(lambda run, attempt, offset_bytes: logs[attempt][offset_bytes:])
    assert last(status(None)) == ""
    assert last(status(1)) == ""
    logs[1] += b"\x1b[36m(Trainer pid=7)\x1b[0m step 1\n\n  \n\x1b[0m\n"
    assert last(status(1)) == "(Trainer pid=7) step 1"
    assert last(status(1)) == "(Trainer pid=7) step 1"
    logs[1] += b"\x1b[1;33mstep 2\x1b[0m \x1b]0;title\x07"  # another escape stays, to be shown escaped
    assert last(status(1)) == "step 2 \x1b]0;title\x07"
    assert last(status(2)) == "second attempt"


def pending(reason: str, next_step: str | None = None, *, phase: Phase = Phase.QUEUED) -> RunStatus:
    facts = RunFacts(run="infl-x", run_dir=None)
    told = BackendFacts(backend="kubernetes", phase=phase, reason=reason, next_step=next_step)
    return derive(told, facts, now_s=0.0)


def followed(statuses: Sequence[RunStatus], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is shown of a run whose polls give these, without the time of day."""
    polls = iter(statuses)
    follow(lambda: next(polls), poll_s=0.0)
    return [line[9:] for line in capsys.readouterr().err.splitlines()]


def test_a_new_reason_is_news_and_a_new_number_in_it_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    advice = "compare hardware with the nodes"
    polls = [
        pending("its pod waits for the scheduler"),
        pending("no node takes its pod: 0/3 nodes are available", advice),
        pending("no node takes its pod: 0/4 nodes are available", advice),
        *(pending(f"pulls its image: back-off {seconds}s, 1:{seconds}") for seconds in (10, 20, 40)),
        pending("no node takes its pod: 0/4 nodes are available", advice),
        pending("cancelled", phase=Phase.CANCELLED),
    ]
    assert followed(polls, capsys) == [
        "infl-x PENDING  no progress known: its pod waits for the scheduler",
        "infl-x PENDING  no progress known: no node takes its pod: 0/3 nodes are available",
        f"next: {advice}",
        "infl-x PENDING  no progress known: pulls its image: back-off 10s, 1:10",
        "infl-x CANCELLED  no progress known: cancelled",
    ]


def test_a_reason_that_was_told_is_told_again_in_another_state(capsys: pytest.CaptureFixture[str]) -> None:
    polls = [
        pending("waits", "wait"),
        pending("runs", phase=Phase.EXECUTING),
        pending("waits", "wait"),
        pending("done", phase=Phase.COMPLETED),
    ]
    told = followed(polls, capsys)
    assert [line.split()[1] for line in told if "next:" not in line] == [
        "PENDING",
        "RUNNING",
        "PENDING",
        "SUCCEEDED",
    ]
    assert sum(line == "next: wait" for line in told) == 2
