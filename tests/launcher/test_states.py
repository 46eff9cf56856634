"""The state machine, by table: backend facts x run-directory facts -> state, reason, next command."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import ExitCode
from launcher.states import BackendFacts, Phase, RunFacts, State, derive

NOW_S = 1_800_000_000.0
SUBMIT = "launcher submit --preset smoke --name infl-smoke-0221"
COLLECT = "launcher collect --run infl-smoke-0221"
LOGS = "launcher logs infl-smoke-0221"
RESUME = "launcher resume infl-smoke-0221"


def backend(phase: Phase, reason: str = "because") -> BackendFacts:
    return BackendFacts(backend="local", phase=phase, reason=reason)


def run(committed: int = 0, total: int | None = 2, attempt: int | None = 1, **fields: object) -> RunFacts:
    missing = () if total is None else tuple(range(committed + 1, total + 1))
    return RunFacts(
        run="infl-smoke-0221", run_dir="/r/infl-smoke-0221", total_steps=total, num_committed=committed,
        missing_steps=missing, attempt=attempt, submit_command=SUBMIT, **fields,  # type: ignore[arg-type]
    )  # fmt: skip


# phase, steps committed of 2 (None: run directory out of reach) -> state, next command
TABLE = [
    (Phase.NEVER_STARTED, 0, State.PENDING, SUBMIT),
    (Phase.QUEUED, 0, State.PENDING, None),
    (Phase.QUEUED, 1, State.PENDING, None),
    (Phase.EXECUTING, 0, State.RUNNING, None),
    (Phase.EXECUTING, 1, State.RUNNING, None),
    (Phase.EXECUTING, 2, State.RUNNING, None),
    (Phase.EXECUTING, None, State.RUNNING, None),
    (Phase.BACKING_OFF, 1, State.RETRYING, None),
    (Phase.SUSPENDED, 1, State.SUSPENDED, RESUME),
    (Phase.SUSPENDED, 2, State.SUCCEEDED, COLLECT),
    (Phase.STOPPING, 2, State.TERMINATING, None),
    (Phase.STUCK, 1, State.STALLED, None),
    (Phase.STOPPING, 1, State.TERMINATING, None),
    (Phase.COMPLETED, 2, State.SUCCEEDED, COLLECT),
    (Phase.COMPLETED, None, State.SUCCEEDED, COLLECT),
    (Phase.COMPLETED, 1, State.FAILED, SUBMIT),
    (Phase.FAILED, 1, State.FAILED, LOGS),
    (Phase.FAILED, None, State.FAILED, LOGS),
    (Phase.CANCELLED, 1, State.CANCELLED, SUBMIT),
    (Phase.LOST, 0, State.FAILED, SUBMIT),
    (Phase.LOST, 1, State.FAILED, SUBMIT),
    (Phase.ABSENT, 0, State.FAILED, SUBMIT),
    (Phase.ABSENT, 1, State.FAILED, SUBMIT),
    (Phase.ABSENT, 2, State.SUCCEEDED, COLLECT),
    (Phase.UNREACHABLE, 0, State.UNKNOWN, None),
    (Phase.UNREACHABLE, None, State.UNKNOWN, None),
    # The run directory is the truth about results, whatever became of what drove the run.
    (Phase.FAILED, 2, State.SUCCEEDED, COLLECT),
    (Phase.CANCELLED, 2, State.SUCCEEDED, COLLECT),
    (Phase.LOST, 2, State.SUCCEEDED, COLLECT),
    (Phase.UNREACHABLE, 2, State.SUCCEEDED, COLLECT),
    (Phase.NEVER_STARTED, 2, State.SUCCEEDED, COLLECT),
]


@pytest.mark.parametrize(("phase", "committed", "state", "next_command"), TABLE)
def test_table(phase: Phase, committed: int | None, state: State, next_command: str | None) -> None:
    facts = run(total=None) if committed is None else run(committed)
    status = derive(backend(phase), facts, now_s=NOW_S)
    assert status.state is state
    assert status.next_command == next_command


def test_table_covers_every_phase() -> None:
    assert {row[0] for row in TABLE} == set(Phase)


def test_the_backends_reason_is_shown_and_a_contradiction_is_told() -> None:
    assert (
        derive(backend(Phase.LOST, "its supervisor is gone"), run(1), now_s=NOW_S).reason
        == "its supervisor is gone"
    )
    complete = derive(backend(Phase.LOST, "its supervisor is gone"), run(2), now_s=NOW_S)
    assert complete.reason == "all steps are committed (its supervisor is gone)"
    hollow = derive(backend(Phase.COMPLETED), run(0), now_s=NOW_S)
    assert hollow.reason == "ended as if done, but steps 1, 2 are not committed"
    damaged = derive(backend(Phase.FAILED, "data error (65)"), run(1, damaged=("x: torn",)), now_s=NOW_S)
    assert damaged.reason == "data error (65); x: torn"


def test_an_unreadable_directory_is_unknown_whatever_the_backend_says_and_settled() -> None:
    facts = RunFacts(run="infl-x-0221", run_dir="/r/infl-x-0221", unreadable="run.json: is empty")
    for phase in Phase:
        status = derive(backend(phase), facts, now_s=NOW_S)
        assert (status.state, status.reason, status.settled) == (State.UNKNOWN, "run.json: is empty", True)
        assert status.steps_committed is None
        assert status.next_command is None


def test_a_poll_that_failed_is_not_settled() -> None:
    assert not derive(backend(Phase.UNREACHABLE), run(1), now_s=NOW_S).settled


def test_age_of_the_last_step_never_runs_backwards() -> None:
    assert (
        derive(backend(Phase.EXECUTING), run(1, last_step_at_s=NOW_S - 4), now_s=NOW_S).last_step_age_s == 4
    )
    ahead = derive(backend(Phase.EXECUTING), run(1, last_step_at_s=NOW_S + 4), now_s=NOW_S)
    assert ahead.last_step_age_s == 0


@given(phase=st.sampled_from(Phase), committed=st.integers(0, 3), total=st.none() | st.integers(1, 3))
def test_every_combination_has_a_state_a_reason_and_an_exit_code(
    phase: Phase, committed: int, total: int | None
) -> None:
    facts = run(min(committed, total or 0), total)
    status = derive(backend(phase), facts, now_s=NOW_S)
    assert status.reason
    assert json.loads(json.dumps(status.to_dict()))["state"] == status.state.value
    ended = {State.SUCCEEDED: 0, State.FAILED: 100, State.CANCELLED: 103}
    assert status.exit_code == ended.get(status.state, ExitCode.RUN_UNFINISHED)
    assert status.settled == (status.state in ended)
    if facts.complete:  # nothing but live work hides that everything is there
        assert status.state in {
            State.SUCCEEDED,
            *(s for s in State if not s.terminal and s is not State.UNKNOWN),
        }
    if status.state is State.SUCCEEDED:
        assert facts.complete or total is None
