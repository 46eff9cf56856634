"""Running a run's attempts one after the other: what the supervisor process does once it has the run."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from influence.rundir import RunDirError, RunPaths, committed_steps, describe
from influence.rundir.clock import utc_now
from launcher.backends import journal
from launcher.backends.attempt import AttemptProcess, marker
from launcher.backends.journal import Outcome, SupervisorPhase, SupervisorRecord, Wish
from launcher.backends.processes import ProcessId, boot_id, family, stop_family
from launcher.backends.processes import describe as describe_processes
from launcher.backends.retry import Action, AttemptEnd, Budget, Decision, RetryPolicy, decide

# How often a supervisor with nothing to do looks for a request to stop that came without a signal.
_IDLE_S = 5.0


class Stop(StrEnum):
    """Why a supervisor ends before the run does."""

    CANCEL = "cancelled"
    SUSPEND = "suspended"
    SIGNAL = "the supervisor was told to stop (SIGTERM) without a request to cancel, as at a shutdown"
    DEADLINE = "the deadline has passed"


# In the order of their weight: a run that is to be cancelled is not suspended.
_STOPS = {Wish.CANCEL: Stop.CANCEL, Wish.SUSPEND: Stop.SUSPEND}
_OUTCOMES = {
    Stop.CANCEL: Outcome.CANCELLED,
    Stop.SUSPEND: Outcome.SUSPENDED,
    Stop.SIGNAL: Outcome.STOPPED,
}


class SignalWaiter:
    """Sleeps until a signal arrives or time is up; remembers a wish to stop.

    Python-level handlers rather than ``SIG_IGN``: ignored signals would stay ignored in the attempts.
    """

    def __init__(self) -> None:
        self.told_to_stop = False
        self._reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGHUP, lambda *_: None)  # the terminal is gone: no concern of ours
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def _stop(self, *_: object) -> None:
        self.told_to_stop = True

    def wait(self, timeout_s: float) -> None:
        ready, _, _ = select.select([self._reader], [], [], max(0.0, timeout_s))
        if ready:
            os.read(self._reader, 4096)


class Supervisor:
    """Runs the attempts of one run; :meth:`run` returns when the run or the wish to run it has ended.

    Args:
        paths: the run directory; ``run.json`` is there.
        policy: retries, grace and deadline.
        total_steps: how many steps make the run complete.
        command: what an attempt executes.
        environment: the attempts' environment, without the run's marker.
        signals: delivers signals as wake-ups.
        resume: go on with the retries that an earlier supervisor left.

    Raises:
        CorruptError: an earlier ``supervisor.json`` is not one.
    """

    def __init__(
        self,
        paths: RunPaths,
        policy: RetryPolicy,
        *,
        total_steps: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        signals: SignalWaiter,
        resume: bool = False,
    ) -> None:
        self._paths = paths
        self._policy = policy
        self._total_steps = total_steps
        self._command = list(command)
        self._environment = dict(environment)
        self._signals = signals
        self._deadline = time.monotonic() + policy.deadline_s
        self._attempt: AttemptProcess | None = None
        before = journal.read_supervisor(paths)
        self._inherited = before.attempt if before is not None else None  # dead or dying, with its keeper
        self._budget = Budget(before.num_charged, before.num_idle) if resume and before else Budget()
        me = ProcessId.of(os.getpid())
        assert me is not None  # noqa: S101  a running process can read its own /proc entry
        self._record = SupervisorRecord(
            pid=me.pid, start_token=me.start_token, boot_id=boot_id(), host=os.uname().nodename,
            started_at=utc_now(), phase=SupervisorPhase.STARTING, reason="the supervisor is starting",
            num_charged=self._budget.num_charged, num_idle=self._budget.num_idle,
        )  # fmt: skip

    def announce(self) -> None:
        """Publish that this supervisor has taken the run.

        Raises:
            StorageError: it cannot be written; the run should not start then.
        """
        journal.remove_leftovers(self._paths)
        journal.write_supervisor(self._paths, self._record)
        journal.append_event(self._paths, "supervisor_started", pid=self._record.pid, host=self._record.host)

    def run(self) -> Outcome:
        """Run attempts to the end; whatever happens, no process of the run is left afterwards."""
        try:
            outcome, reason = self._supervise()
        except Exception as error:  # a bug or a broken disk must not leave a trainer without its keeper
            log(traceback.format_exc())
            outcome, reason = Outcome.FAILED, f"the supervisor failed: {type(error).__name__}: {error}"
        self._sweep(leader=self._attempt.process if self._attempt else None)
        self._event("run_ended", outcome=outcome.value, reason=reason)
        self._publish(
            phase=SupervisorPhase.ENDED, reason=reason, outcome=outcome, ended_at=utc_now(),
            attempt_pid=None, attempt_start_token=None, next_attempt_at=None,
        )  # fmt: skip
        return outcome

    def _supervise(self) -> tuple[Outcome, str]:
        self._sweep(leader=self._inherited)
        if self._complete():
            return Outcome.SUCCEEDED, "all steps committed"
        while True:
            stop = self._wish_to_stop()
            if stop is not None:
                return self._stopped(stop)
            end, stopped_for = self._run_attempt()
            decision = decide(end, self._budget, self._policy)
            if stopped_for is not None and decision.action is not Action.SUCCEED:
                # It ended because it was told to: whatever it exited with is no failure of the run.
                self._decided("stop", charged=False, reason=f"{describe(end.exit_code)}; {stopped_for.value}")
                continue
            self._budget = decision.budget
            self._decided(
                decision.action.value,
                charged=decision.charged,
                reason=decision.reason,
                wait_s=decision.wait_s,
            )
            if decision.action is Action.SUCCEED:
                return Outcome.SUCCEEDED, decision.reason
            if self._wish_to_stop() is not None:
                continue
            if decision.action is Action.FAIL:
                return Outcome.FAILED, decision.reason
            if time.monotonic() + decision.wait_s >= self._deadline:
                return Outcome.FAILED, f"{decision.reason}, but {Stop.DEADLINE.value} by then"
            self._back_off(decision)

    def _decided(self, decision: str, **facts: Any) -> None:
        self._event("decided", decision=decision, **facts)

    def _run_attempt(self) -> tuple[AttemptEnd, Stop | None]:
        """Run one attempt to its end; with it, what made this supervisor stop it, if it did."""
        stop: Stop | None = None
        before = self._committed()
        attempt = AttemptProcess.start(self._paths, self._command, self._environment)
        self._attempt = attempt
        self._event("attempt_started", pid=attempt.process.pid)
        self._publish(
            phase=SupervisorPhase.RUNNING, reason="the trainer runs", next_attempt_at=None,
            attempt_pid=attempt.process.pid, attempt_start_token=attempt.process.start_token,
        )  # fmt: skip
        while attempt.poll() is None:
            stop = self._wish_to_stop()
            if stop is not None:
                self._publish(phase=SupervisorPhase.STOPPING, reason=f"stopping: {stop.value}")
                self._event("stopping", reason=stop.value)
                self._sweep(leader=attempt.process)
                break
            self._signals.wait(min(_IDLE_S, self._deadline - time.monotonic()))
        while attempt.poll() is None:  # killed, and about to be reaped
            self._signals.wait(_IDLE_S)
        self._sweep(leader=None)
        self._attempt = None
        code = attempt.exit_code
        assert code is not None  # noqa: S101  the loops above end only with a code
        after = self._committed()
        self._event(
            "attempt_ended", attempt=attempt.number(self._paths), exit_code=code, num_committed=len(after)
        )
        end = AttemptEnd(
            exit_code=code,
            complete=self._complete(),
            progressed=bool(after - before),
            detail=attempt.last_words(self._paths),
        )
        return end, stop

    def _back_off(self, decision: Decision) -> None:
        """Wait for the next attempt, or for a wish to stop."""
        start_at = time.monotonic() + decision.wait_s
        self._publish(
            phase=SupervisorPhase.BACKING_OFF, reason=decision.reason,
            num_charged=decision.budget.num_charged, num_idle=decision.budget.num_idle,
            next_attempt_at=_utc_in(decision.wait_s), attempt_pid=None, attempt_start_token=None,
        )  # fmt: skip
        while (left_s := start_at - time.monotonic()) > 0 and self._wish_to_stop() is None:
            self._signals.wait(min(_IDLE_S, left_s))

    def _wish_to_stop(self) -> Stop | None:
        try:
            for wish, stop in _STOPS.items():
                if journal.standing_request(self._paths, wish) is not None:
                    return stop
        except RunDirError as error:  # a disk that stutters is no reason to stop a trainer
            log(f"cannot look for a request to stop: {error}")
        if self._signals.told_to_stop:
            return Stop.SIGNAL
        return Stop.DEADLINE if time.monotonic() >= self._deadline else None

    def _stopped(self, stop: Stop) -> tuple[Outcome, str]:
        if stop in _OUTCOMES:
            return _OUTCOMES[stop], stop.value
        return Outcome.FAILED, f"{stop.value} ({self._policy.deadline_s:g} s)"

    def _committed(self) -> set[int]:
        return set(self._paths.committed_step_numbers())

    def _complete(self) -> bool:
        # A damaged record is no commit; the next attempt will say what is wrong with it.
        steps = committed_steps(self._paths, damaged=[])
        return all(step in steps for step in range(1, self._total_steps + 1))

    def _sweep(self, leader: ProcessId | None) -> None:
        """Stop every process of the run but this one."""

        def pause(seconds: float) -> None:
            self._signals.wait(seconds)
            if self._attempt is not None:
                self._attempt.poll()

        mark = marker(self._paths)
        left = stop_family(
            lambda: family(mark, under=os.getpid()),
            leader=leader,
            grace_s=self._policy.grace_period_s,
            pause=pause,
        )
        if left:
            self._event("survivors", processes=describe_processes(left))

    def _publish(self, **changes: Any) -> None:
        self._record = replace(self._record, **changes)
        try:
            journal.write_supervisor(self._paths, self._record)
        except (RunDirError, OSError) as error:  # a full disk stops the reports, not the run
            log(f"cannot write supervisor.json: {error}")

    def _event(self, event: str, **facts: Any) -> None:
        log(" ".join([event, *(f"{key}={value}" for key, value in facts.items())]))
        try:
            journal.append_event(self._paths, event, **facts)
        except OSError as error:
            log(f"cannot write events.jsonl: {error}")


def _utc_in(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def log(text: str) -> None:
    """A line for ``supervisor.log``; a full disk must not stop the supervisor."""
    try:
        sys.stderr.write(f"{utc_now()} {text}\n")
        sys.stderr.flush()
    except OSError:
        pass
