"""Suspending and resuming on this machine: nothing runs in between, nothing is charged, and it goes on."""

from __future__ import annotations

import json
import signal

import pytest

from launcher.backends import journal
from launcher.backends.journal import Outcome, Wish
from launcher.lifecycle import Action, carry_out, plan_submit
from launcher.states import Phase, State
from tests.launcher.local_run import LocalRun, launcher, wait_for

pytestmark = pytest.mark.slow  # real processes and their grace periods


def suspend(run: LocalRun, *options: str) -> tuple[int, dict[str, object]]:
    done = launcher("suspend", run.name, "--output", "json", *options, root=run.root)
    return done.returncode, json.loads(done.stdout)


def test_suspended_during_an_attempt_nothing_is_left_and_nothing_charged(local_run: LocalRun) -> None:
    local_run.order(["commit 1", "orphan", "hang"], ["commit 2", "exit 0"]).start()
    local_run.wait_for_log("hang")
    code, document = suspend(local_run)
    assert (code, document["state"], document["changed"]) == (0, "SUSPENDED", True)
    assert document["next_command"] == f"launcher resume {local_run.name}"
    assert local_run.living() == []
    assert not local_run.supervisor().alive()
    (decided,) = local_run.events("decided")
    assert (decided["decision"], decided["charged"]) == ("stop", False)
    assert local_run.backend.resume(local_run.name).phase in (Phase.QUEUED, Phase.EXECUTING, Phase.COMPLETED)
    status = local_run.wait_settled()
    assert (status.state, status.attempt, status.charged_retries) == (State.SUCCEEDED, 2, 0)


def test_a_deaf_attempt_is_killed_and_not_charged(local_run: LocalRun) -> None:
    local_run.order(["deaf"], ["commit 1", "commit 2", "exit 0"], grace_period_s=1, backoff_limit=0).start()
    local_run.wait_for_log("\ndeaf\n")
    assert local_run.place.backend.suspend(local_run.name).phase is Phase.SUSPENDED
    assert local_run.events("attempt_ended")[0]["exit_code"] == -signal.SIGKILL
    local_run.backend.resume(local_run.name)
    assert local_run.wait_settled().state is State.SUCCEEDED


def test_it_goes_on_with_the_retries_that_it_had(local_run: LocalRun) -> None:
    """Submitting again would give fresh ones."""
    local_run.order(["exit 3"], ["hang"], ["exit 3"], ["exit 3"], backoff_limit=2).start()
    local_run.wait_for_log("hang", attempt=2)
    suspend(local_run)
    assert local_run.status().charged_retries == 1
    local_run.backend.resume(local_run.name)
    status = local_run.wait_settled()
    assert (status.state, status.charged_retries) == (State.FAILED, 2)
    assert len(local_run.pids("starts")) == 4
    assert "no retry left of 2" in status.reason


def test_during_a_back_off_and_before_it_started(local_run: LocalRun) -> None:
    local_run.order(["exit 3"], ["commit 1", "commit 2", "exit 0"], backoff_s=300)
    assert local_run.backend.suspend(local_run.name).phase is Phase.SUSPENDED
    local_run.backend.resume(local_run.name)
    wait_for(lambda: local_run.status().state is State.RETRYING)
    code, document = suspend(local_run)
    assert (code, document["state"]) == (0, "SUSPENDED")
    local_run.backend.resume(local_run.name)  # at once: the wait belonged to the supervisor that is gone
    assert local_run.wait_settled().state is State.SUCCEEDED


def test_twice_is_once_for_both(local_run: LocalRun) -> None:
    local_run.order(["hang"]).start()
    local_run.wait_for_log("hang")
    assert suspend(local_run)[1]["changed"] is True
    assert suspend(local_run)[1]["changed"] is False
    for _ in range(2):
        local_run.backend.resume(local_run.name)
    wait_for(lambda: local_run.status().state is State.RUNNING)
    assert len(local_run.events("supervisor_started")) == 2
    done = launcher("resume", local_run.name, root=local_run.root)
    assert "is RUNNING" in done.stdout


def test_a_submit_of_a_suspended_run_adopts_it_and_starts_nothing(local_run: LocalRun) -> None:
    local_run.order(["hang"]).start()
    local_run.wait_for_log("hang")
    local_run.backend.suspend(local_run.name)
    plan = plan_submit(local_run.site, local_run.run)
    assert plan.action is Action.ADOPT
    assert not carry_out(local_run.site, plan)
    assert not local_run.backend.submit(local_run.run)
    assert local_run.status().state is State.SUSPENDED


def test_a_suspended_run_can_be_cancelled_and_then_submitted(local_run: LocalRun) -> None:
    local_run.order(["hang"], ["commit 1", "commit 2", "exit 0"]).start()
    local_run.wait_for_log("hang")
    local_run.backend.suspend(local_run.name)
    assert local_run.backend.cancel(local_run.name).phase is Phase.CANCELLED
    assert local_run.backend.suspend(local_run.name).phase is Phase.CANCELLED
    assert local_run.backend.resume(local_run.name).phase is Phase.CANCELLED
    assert local_run.start().wait_settled().state is State.SUCCEEDED


@pytest.mark.parametrize("ending", [["commit 1", "commit 2", "exit 0"], ["exit 78"]])
def test_a_finished_run_stays_as_it_ended(local_run: LocalRun, ending: list[str]) -> None:
    ended = local_run.order(ending).start().wait_settled()
    code, document = suspend(local_run)
    assert (code, document["state"], document["changed"]) == (0, ended.state.value, False)
    assert journal.standing_request(local_run.paths, Wish.SUSPEND) is None
    done = launcher("resume", local_run.name, root=local_run.root)
    assert done.returncode == 0
    assert "nothing to resume" in done.stdout


def test_a_lost_supervisor_leaves_a_run_that_can_be_suspended(local_run: LocalRun) -> None:
    local_run.order(["orphan", "deaf"], ["commit 1", "commit 2", "exit 0"], grace_period_s=1).start()
    local_run.wait_for_log("\ndeaf\n")
    local_run.supervisor().send(signal.SIGKILL)
    wait_for(lambda: not local_run.supervisor().alive())
    assert suspend(local_run)[1]["state"] == "SUSPENDED"
    assert local_run.living() == []
    local_run.backend.resume(local_run.name)
    assert local_run.wait_settled().state is State.SUCCEEDED


def test_a_resume_that_died_half_way_leaves_a_run_that_can_be_submitted(local_run: LocalRun) -> None:
    local_run.order(["hang"], ["commit 1", "commit 2", "exit 0"]).start()
    local_run.wait_for_log("hang")
    local_run.backend.suspend(local_run.name)
    record = journal.read_supervisor(local_run.paths)
    assert record is not None
    assert record.outcome is Outcome.SUSPENDED
    local_run.paths.suspend_file.unlink()
    status = local_run.status()
    assert (status.state, status.next_command is not None) == (State.FAILED, True)
    assert local_run.start().wait_settled().state is State.SUCCEEDED
