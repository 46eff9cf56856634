"""Cancelling: whatever state the run is in, nothing is left afterwards, and repeating it does no harm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from launcher.backends import journal
from launcher.backends.journal import Wish
from launcher.backends.processes import ProcessId
from launcher.states import State
from tests.launcher.local_run import GENEROUS_S, LocalRun, launcher, python_path, supervise, wait_for

pytestmark = pytest.mark.slow  # a minute in all: waits, grace periods, many processes


def cancel(run: LocalRun, *options: str) -> tuple[int, dict[str, object]]:
    done = launcher("cancel", run.name, "--output", "json", *options, root=run.root)
    return done.returncode, json.loads(done.stdout)


def test_during_an_attempt(local_run: LocalRun) -> None:
    local_run.order(["commit 1", "orphan", "hang"]).start()
    local_run.wait_for_log("hang")
    code, document = cancel(local_run)
    assert (code, document["state"], document["changed"]) == (0, "CANCELLED", True)
    assert document["steps_committed"] == 1
    assert local_run.living() == []
    assert ProcessId.of(local_run.pids("orphans")[0]) is None
    assert not local_run.supervisor().alive()
    assert local_run.events("attempt_ended")[0]["exit_code"] == 75  # it was asked before it was made to
    assert local_run.events("run_ended")[0]["outcome"] == "cancelled"


def test_during_a_back_off(local_run: LocalRun) -> None:
    local_run.order(["exit 3"], ["hang"], backoff_s=300).start()
    wait_for(lambda: local_run.status().state is State.RETRYING)
    code, document = cancel(local_run)
    assert (code, document["state"]) == (0, "CANCELLED")
    assert len(local_run.pids("starts")) == 1


def test_processes_deaf_to_sigterm_are_killed(local_run: LocalRun) -> None:
    local_run.order(["deaf-orphan", "deaf"], grace_period_s=1).start()
    local_run.wait_for_log("\ndeaf\n")
    assert cancel(local_run)[1]["state"] == "CANCELLED"
    assert local_run.living() == []
    assert ProcessId.of(local_run.pids("orphans")[0]) is None


def test_after_the_supervisor_was_killed(local_run: LocalRun) -> None:
    local_run.order(["orphan", "deaf"], grace_period_s=1).start()
    local_run.wait_for_log("\ndeaf\n")
    local_run.supervisor().send(signal.SIGKILL)
    wait_for(lambda: not local_run.supervisor().alive())
    assert ProcessId.of(local_run.pids("orphans")[0]) is not None
    code, document = cancel(local_run)
    assert (code, document["state"], document["changed"]) == (0, "CANCELLED", True)
    assert local_run.living() == []


def test_a_suspended_supervisor_hears_it(local_run: LocalRun) -> None:
    local_run.order(["hang"]).start()
    local_run.wait_for_log("hang")
    os.kill(local_run.supervisor().pid, signal.SIGSTOP)
    wait_for(lambda: local_run.status().state is State.STALLED)
    assert cancel(local_run)[1]["state"] == "CANCELLED"


def test_twice_is_once(local_run: LocalRun) -> None:
    local_run.order(["hang"]).start()
    local_run.wait_for_log("hang")
    assert cancel(local_run)[1]["changed"] is True
    code, document = cancel(local_run)
    assert (code, document["state"], document["changed"]) == (0, "CANCELLED", False)
    assert len(local_run.events("run_ended")) == 1


def test_many_at_once_agree(local_run: LocalRun) -> None:
    local_run.order(["hang"]).start()
    local_run.wait_for_log("hang")
    answers: list[tuple[int, dict[str, object]]] = []
    threads = [threading.Thread(target=lambda: answers.append(cancel(local_run))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GENEROUS_S)
    assert [(code, document["state"]) for code, document in answers] == [(0, "CANCELLED")] * 4
    assert local_run.living() == []


@pytest.mark.parametrize(
    ("ending", "state"), [(["commit 1", "commit 2", "exit 0"], "SUCCEEDED"), (["exit 78"], "FAILED")]
)
def test_a_finished_run_stays_as_it_ended(local_run: LocalRun, ending: list[str], state: str) -> None:
    local_run.order(ending).start().wait_settled()
    code, document = cancel(local_run)
    assert (code, document["state"], document["changed"]) == (0, state, False)
    assert journal.standing_request(local_run.paths, Wish.CANCEL) is None
    text = launcher("cancel", local_run.name, root=local_run.root)
    assert f"already {state}" in text.stdout


def test_before_it_started(local_run: LocalRun) -> None:
    local_run.order(["hang"])
    assert cancel(local_run)[1]["state"] == "CANCELLED"
    assert not local_run.paths.supervisor_json.exists()


def test_it_stays_cancelled_until_somebody_submits_it_again(local_run: LocalRun) -> None:
    local_run.order(["hang"], ["commit 1", "commit 2", "exit 0"]).start()
    local_run.wait_for_log("hang")
    cancel(local_run)
    assert local_run.status().state is State.CANCELLED
    local_run.start()
    assert journal.standing_request(local_run.paths, Wish.CANCEL) is None
    assert local_run.wait_settled().state is State.SUCCEEDED


def test_only_the_request_that_submit_saw_is_withdrawn(local_run: LocalRun) -> None:
    """A cancel that comes after a submit has looked must not get lost."""
    local_run.order(["hang"])
    request = journal.request(local_run.paths, Wish.CANCEL)
    assert journal.request(local_run.paths, Wish.CANCEL) == request
    journal.withdraw(local_run.paths, Wish.CANCEL, "an earlier one")
    assert journal.standing_request(local_run.paths, Wish.CANCEL) == request
    journal.withdraw(local_run.paths, Wish.CANCEL, request)
    assert journal.standing_request(local_run.paths, Wish.CANCEL) is None
    local_run.paths.cancel_file.write_text("")
    assert journal.standing_request(local_run.paths, Wish.CANCEL) is not None  # torn, but a request


def test_a_supervisor_that_finds_a_request_starts_nothing(local_run: LocalRun) -> None:
    local_run.order(["hang"])
    journal.request(local_run.paths, Wish.CANCEL)
    assert supervise(local_run.paths.root_dir, *local_run.command).returncode == 1
    assert local_run.pids("starts") == []
    assert local_run.status().state is State.CANCELLED


def test_a_time_out_says_that_the_request_stands(local_run: LocalRun) -> None:
    local_run.order(["deaf"], grace_period_s=600).start()
    local_run.wait_for_log("\ndeaf\n")
    done = launcher("cancel", local_run.name, "--timeout", "1", root=local_run.root)
    assert done.returncode == 5
    assert "TERMINATING" in done.stderr
    assert "the request to cancel stands" in done.stderr
    assert local_run.status().state is State.TERMINATING
    os.kill(local_run.pids("starts")[0], signal.SIGKILL)
    assert local_run.wait_settled().state is State.CANCELLED


def test_ctrl_c_of_cancel_says_that_it_goes_on(local_run: LocalRun) -> None:
    local_run.order(["deaf"], grace_period_s=600).start()
    local_run.wait_for_log("\ndeaf\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "cancel", local_run.name],
        env={**os.environ, "PYTHONPATH": python_path(), "INFL_ROOT": str(local_run.root)},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(lambda: local_run.status().state is State.TERMINATING)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=GENEROUS_S)
    assert process.returncode == 130
    assert "goes on" in err
    os.kill(local_run.pids("starts")[0], signal.SIGKILL)


def test_no_such_run(local_run: LocalRun) -> None:
    done = launcher("cancel", "infl-none-0221", root=local_run.root)
    assert done.returncode == 102
    assert "Traceback" not in done.stderr
