"""The supervisor with real processes: a fake trainer that honours the run directory."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from influence.rundir import list_attempts
from launcher.backends import journal
from launcher.backends.attempt import marker
from launcher.backends.journal import Outcome, SupervisorPhase
from launcher.backends.processes import ProcessId
from launcher.states import State
from tests.launcher.local_run import LocalRun, supervise, wait_for

pytestmark = pytest.mark.slow  # a minute in all: waits, grace periods, many processes


def test_success_in_one_attempt(local_run: LocalRun) -> None:
    status = local_run.order(["commit 1", "commit 2", "exit 0"]).start().wait_settled()
    assert (status.state, status.steps_committed, status.attempt) == (State.SUCCEEDED, 2, 1)
    assert status.charged_retries == 0
    assert [
        (e["attempt"], e["exit_code"], e["num_committed"]) for e in local_run.events("attempt_ended")
    ] == [(1, 0, 2)]
    assert local_run.events("run_ended")[0]["outcome"] == "succeeded"
    wait_for(lambda: not local_run.supervisor().alive())


def test_exit_3_is_retried_to_the_limit_and_charged(local_run: LocalRun) -> None:
    status = local_run.order(["exit 3"], backoff_limit=2).start().wait_settled()
    assert (status.state, status.attempt, status.charged_retries) == (State.FAILED, 3, 2)
    assert "no retry left of 2" in status.reason
    assert [e["charged"] for e in local_run.events("decided")] == [True, True, True]
    ended = local_run.events("attempt_ended")
    assert [(event["attempt"], event["exit_code"]) for event in ended] == [(1, 3), (2, 3), (3, 3)]
    assert len(local_run.pids("starts")) == 3


@pytest.mark.parametrize("code", [64, 65, 78])
def test_fatal_codes_are_not_retried(local_run: LocalRun, code: int) -> None:
    status = local_run.order([f"exit {code}"]).start().wait_settled()
    assert (status.state, status.attempt) == (State.FAILED, 1)
    assert str(code) in status.reason
    assert len(local_run.pids("starts")) == 1


def test_exit_75_is_retried_without_charge(local_run: LocalRun) -> None:
    local_run.order(
        ["exit 75"], ["exit 75"], ["exit 75"], ["commit 1", "commit 2", "exit 0"], backoff_limit=0
    )
    status = local_run.start().wait_settled()
    assert (status.state, status.attempt, status.charged_retries) == (State.SUCCEEDED, 4, 0)
    assert [e["charged"] for e in local_run.events("decided")] == [False, False, False, False]


def test_a_killed_attempt_is_retried_and_keeps_its_step(local_run: LocalRun) -> None:
    local_run.order(["commit 1", "kill"], ["commit 2", "exit 0"]).start()
    status = local_run.wait_settled()
    assert (status.state, status.attempt, status.charged_retries) == (State.SUCCEEDED, 2, 1)
    assert local_run.events("attempt_ended")[0]["exit_code"] == -signal.SIGKILL
    first, second = list_attempts(local_run.paths)
    assert (first.exit_code, second.exit_code) == (None, 0)  # a killed attempt cannot say how it ended
    assert "SIGKILL" in local_run.events("decided")[0]["reason"]


def test_exit_0_without_the_steps_is_charged(local_run: LocalRun) -> None:
    status = local_run.order(["commit 1", "exit 0"], ["exit 0"], backoff_limit=1).start().wait_settled()
    assert (status.state, status.steps_committed) == (State.FAILED, 1)
    assert "before all steps were committed" in status.reason


def test_a_start_that_claims_no_attempt_has_no_number(local_run: LocalRun) -> None:
    local_run.order(["raw-exit 1"], ["commit 1", "commit 2", "exit 0"]).start()
    assert local_run.wait_settled().state is State.SUCCEEDED
    assert [e["attempt"] for e in local_run.events("attempt_ended")] == [None, 1]


def test_a_complete_run_ends_without_another_attempt(local_run: LocalRun) -> None:
    """All steps are there though the attempt died: a retry would find nothing to do."""
    status = local_run.order(["commit 1", "commit 2", "kill"]).start().wait_settled()
    assert (status.state, status.attempt) == (State.SUCCEEDED, 1)
    assert "SIGKILL" in status.reason


def test_a_program_that_cannot_be_started_fails_the_run_with_a_reason(local_run: LocalRun) -> None:
    local_run.order(["exit 0"])
    backend = type(local_run.backend)(local_run.place.profile, ["/nonexistent/trainer"])
    assert backend.submit(local_run.run)
    status = local_run.wait_settled()
    assert status.state is State.FAILED
    assert "/nonexistent/trainer" in status.reason


@pytest.mark.parametrize("orphan", ["orphan", "bare-orphan", "deaf-orphan"])
def test_daemons_that_an_attempt_leaves_are_swept_before_the_next(local_run: LocalRun, orphan: str) -> None:
    """Also without the marker in their environment, and also when they ignore SIGTERM."""
    local_run.order([orphan, "kill"], ["hang"]).start()
    local_run.wait_for_log("hang", attempt=2)
    (daemon,) = local_run.pids("orphans")
    assert ProcessId.of(daemon) is None


def test_no_zombies_pile_up_under_a_running_attempt(local_run: LocalRun) -> None:
    """Orphans that end while their attempt goes on are adopted, and must be reaped."""
    local_run.order(["orphan", "hang"]).start()
    local_run.wait_for_log("hang")
    (daemon,) = local_run.pids("orphans")
    os.kill(daemon, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{daemon}").exists())


def test_sigterm_is_forwarded_and_the_run_can_go_on(local_run: LocalRun) -> None:
    local_run.order(["commit 1", "hang"], ["commit 2", "exit 0"]).start()
    local_run.wait_for_log("hang")
    supervisor = local_run.supervisor()
    supervisor.send(signal.SIGTERM)
    wait_for(lambda: not supervisor.alive())
    record = journal.read_supervisor(local_run.paths)
    assert record is not None
    assert record.outcome is Outcome.STOPPED
    assert local_run.events("attempt_ended")[0]["exit_code"] == 75
    stopped = local_run.status()
    assert stopped.state is State.FAILED
    assert stopped.next_command is not None
    assert stopped.next_command.startswith("launcher submit")
    assert local_run.start().wait_settled().state is State.SUCCEEDED
    assert local_run.status().charged_retries == 0


def test_an_attempt_deaf_to_sigterm_is_killed_after_its_grace(local_run: LocalRun) -> None:
    local_run.order(["deaf"], grace_period_s=1).start()
    local_run.wait_for_log("deaf")
    supervisor = local_run.supervisor()
    supervisor.send(signal.SIGTERM)
    wait_for(lambda: not supervisor.alive())
    assert local_run.events("attempt_ended")[0]["exit_code"] == -signal.SIGKILL
    assert local_run.living() == []


def test_the_deadline_stops_an_attempt_and_fails_the_run(local_run: LocalRun) -> None:
    status = local_run.order(["hang"], deadline_s=1).start().wait_settled()
    assert status.state is State.FAILED
    assert "deadline" in status.reason
    assert local_run.living() == []


def test_no_wait_that_would_outlast_the_deadline(local_run: LocalRun) -> None:
    status = local_run.order(["exit 3"], deadline_s=100, backoff_s=200).start().wait_settled()
    assert status.state is State.FAILED
    assert "deadline" in status.reason


def test_hangup_and_ctrl_c_of_the_terminal_do_not_reach_it(local_run: LocalRun) -> None:
    local_run.order(["hang"]).start()
    local_run.wait_for_log("hang")
    supervisor, (attempt,) = local_run.supervisor(), local_run.pids("starts")
    assert os.getsid(supervisor.pid) != os.getsid(0)
    assert supervisor.pid != os.getsid(supervisor.pid)  # no session leader, so it never gets a terminal
    assert os.getpgid(attempt) != os.getpgid(supervisor.pid)
    supervisor.send(signal.SIGHUP)
    os.kill(attempt, signal.SIGTERM)
    local_run.wait_for_log("hang", attempt=2)  # it has started the next attempt, so it lives
    assert supervisor.alive()
    assert Path(f"/proc/{supervisor.pid}/cwd").readlink() == local_run.paths.root_dir
    assert Path(f"/proc/{supervisor.pid}/fd/0").readlink() == Path("/dev/null")
    assert Path(f"/proc/{supervisor.pid}/fd/2").readlink() == local_run.paths.supervisor_log


def test_a_killed_supervisor_takes_its_attempt_along_and_the_run_goes_on(local_run: LocalRun) -> None:
    local_run.order(["commit 1", "orphan", "hang"], ["hang"], ["commit 2", "exit 0"]).start()
    local_run.wait_for_log("hang")
    (attempt,), (daemon,) = local_run.pids("starts"), local_run.pids("orphans")
    local_run.supervisor().send(signal.SIGKILL)
    wait_for(lambda: ProcessId.of(attempt) is None)  # by the kernel's word, with grace
    assert list_attempts(local_run.paths)[0].exit_code == 75
    lost = local_run.status()
    assert (lost.state, lost.settled) == (State.FAILED, True)
    assert "is gone" in lost.reason
    assert lost.next_command is not None
    assert local_run.name in lost.next_command
    assert ProcessId.of(daemon) is not None  # nobody has swept it yet
    local_run.start().wait_for_log("hang", attempt=2)
    assert ProcessId.of(daemon) is None  # swept before the next attempt began
    os.kill(local_run.pids("starts")[1], signal.SIGTERM)
    assert local_run.wait_settled().state is State.SUCCEEDED


def test_a_second_supervisor_leaves_the_run_to_the_first(local_run: LocalRun) -> None:
    local_run.order(["hang"]).start()
    first = local_run.supervisor()
    local_run.wait_for_log("hang")
    assert not local_run.backend.submit(local_run.run)
    by_hand = supervise(local_run.paths.root_dir, *local_run.command)
    assert by_hand.returncode == 0
    assert local_run.supervisor() == first
    assert len(local_run.pids("starts")) == 1


def test_in_the_foreground_it_tells_by_its_exit_code(local_run: LocalRun) -> None:
    """For a process manager of one's own, such as systemd."""
    local_run.order(["exit 78"], ["commit 1", "commit 2", "exit 0"])
    for expected, decision in ((1, "fail"), (0, "succeed")):
        done = supervise(local_run.paths.root_dir, *local_run.command)
        assert done.returncode == expected, done.stderr
        assert local_run.events("decided")[-1]["decision"] == decision


def test_a_directory_that_is_no_run_is_refused_with_a_reason(tmp_path: Path) -> None:
    done = supervise(tmp_path / "infl-none-0221")
    assert done.returncode == 1
    assert "no run.json" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_each_supervisor_has_fresh_retries(local_run: LocalRun) -> None:
    local_run.order(["exit 3"], backoff_limit=1).start().wait_settled()
    assert local_run.start().wait_settled().attempt == 4


def test_history_survives_a_torn_line(local_run: LocalRun) -> None:
    local_run.order(["exit 3"])
    local_run.paths.local_dir.mkdir()
    journal.append_event(local_run.paths, "one")
    with local_run.paths.events_jsonl.open("ab") as stream:
        stream.write(b'{"at": "2026-02-21T00:0')
    journal.append_event(local_run.paths, "two")
    assert [event["event"] for event in journal.read_events(local_run.paths)] == ["one", "two"]


def test_attempts_carry_the_marker_and_no_other_runs(
    local_run: LocalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFL_RUN_DIR", "/some/other/run")
    local_run.order(["hang"]).start()
    local_run.wait_for_log("hang")
    environ = Path(f"/proc/{local_run.pids('starts')[0]}/environ").read_bytes().split(b"\0")
    assert "=".join(marker(local_run.paths)).encode() in environ
    assert b"INFL_RUN_DIR=/some/other/run" not in environ
    assert b"INFL_RUN_DIR" not in Path(f"/proc/{local_run.supervisor().pid}/environ").read_bytes()


def test_supervisor_record_tells_phases(local_run: LocalRun) -> None:
    local_run.order(["exit 3"], ["hang"], backoff_s=300).start()

    def phase() -> SupervisorPhase:
        record = journal.read_supervisor(local_run.paths)
        assert record is not None
        return record.phase

    wait_for(lambda: phase() is SupervisorPhase.BACKING_OFF)
    status = local_run.status()
    assert status.state is State.RETRYING
    assert "retry 1 of 2 in" in status.reason
    os.kill(local_run.supervisor().pid, signal.SIGSTOP)
    wait_for(lambda: local_run.status().state is State.STALLED)
    assert "kill -CONT" in local_run.status().reason
