"""What `--follow` and `--watch` show of a run."""

from __future__ import annotations

from launcher.progress import LastLogLine
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
