"""What follows an attempt's end, by table and by simulation of whole runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.backends.retry import (
    MAX_BACKOFF_S,
    MAX_IDLE_RETRIES,
    Action,
    AttemptEnd,
    Budget,
    Decision,
    RetryPolicy,
    backoff_s,
    decide,
)

POLICY = RetryPolicy(backoff_limit=2, backoff_s=10, grace_period_s=30, deadline_s=1000)


FRESH = Budget()


def after(
    exit_code: int, budget: Budget = FRESH, *, complete: bool = False, progressed: bool = False
) -> Decision:
    return decide(AttemptEnd(exit_code=exit_code, complete=complete, progressed=progressed), budget, POLICY)


@pytest.mark.parametrize(
    ("exit_code", "action", "charged"),
    [
        (64, Action.FAIL, False),
        (65, Action.FAIL, False),
        (78, Action.FAIL, False),
        (75, Action.RETRY, False),
        (143, Action.RETRY, False),
        (-15, Action.RETRY, False),
        (1, Action.RETRY, True),
        (3, Action.RETRY, True),
        (137, Action.RETRY, True),
        (-9, Action.RETRY, True),
        (-11, Action.RETRY, True),
        (0, Action.RETRY, True),  # exit 0 with steps missing is a failure like any other
    ],
)
def test_exit_code_table(exit_code: int, action: Action, charged: bool) -> None:
    decision = after(exit_code)
    assert (decision.action, decision.charged) == (action, charged)
    assert decision.budget.num_charged == (1 if charged else 0)
    spent = after(exit_code, Budget(num_charged=2))
    assert spent.action is (Action.FAIL if charged else action)


@pytest.mark.parametrize("exit_code", [0, 1, 75, 78, -9])
def test_a_complete_run_has_succeeded_whatever_the_exit_code(exit_code: int) -> None:
    assert after(exit_code, complete=True).action is Action.SUCCEED


def test_reasons_name_the_code_and_the_retry() -> None:
    assert "78" in after(78).reason
    assert "SIGKILL" in after(-9).reason
    assert "retry 1 of 2" in after(-9).reason
    assert "no retry left of 2" in after(3, Budget(num_charged=2)).reason
    assert "exited 0 before all steps" in after(0).reason


def test_the_trainers_own_words_stand_in_the_reason_once() -> None:
    end = AttemptEnd(exit_code=78, complete=False, progressed=False, detail="Ray needs 4 CPUs")
    assert decide(end, FRESH, POLICY).reason.startswith("configuration error (78): Ray needs 4 CPUs; ")
    same = AttemptEnd(exit_code=78, complete=False, progressed=False, detail="configuration error (78)")
    assert decide(same, FRESH, POLICY).reason.startswith("configuration error (78); ")


def test_backoff_doubles_to_six_minutes_and_starts_again_after_progress() -> None:
    assert [backoff_s(n, POLICY) for n in range(1, 8)] == [10, 20, 40, 80, 160, 320, MAX_BACKOFF_S]
    assert backoff_s(10_000, POLICY) == MAX_BACKOFF_S
    assert after(3, Budget(0, num_idle=4)).wait_s == 160
    assert after(3, Budget(0, num_idle=4), progressed=True).wait_s == 10


@given(codes=st.lists(st.sampled_from([0, 1, 3, 75, -9, -15, 137]), max_size=400))
def test_every_sequence_of_ends_without_progress_ends(codes: list[int]) -> None:
    """Charged retries stop at the limit, free ones are bounded too, and only charged ones are counted."""
    budget, charged, waits = Budget(), 0, []
    for code in codes:
        decision = after(code, budget)
        if decision.action is not Action.RETRY:
            assert charged == POLICY.backoff_limit or len(waits) == MAX_IDLE_RETRIES
            return
        charged += decision.charged
        budget = decision.budget
        waits.append(decision.wait_s)
        assert budget.num_charged == charged <= POLICY.backoff_limit
        assert waits == sorted(waits)
    assert len(waits) <= MAX_IDLE_RETRIES
