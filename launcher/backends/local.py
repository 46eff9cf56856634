"""Runs on this machine: a supervisor process a run, the run directory as the only record.

Nothing is remembered elsewhere, so a run is found by looking into the root, and a supervisor that was
killed or a machine that was restarted is seen by its start token, which no living process has.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path

from influence.rundir import (
    NotARunError,
    RunDirError,
    RunPaths,
    RunSpec,
    StorageError,
    create_run,
    read_run,
)
from influence.rundir.clock import parse_time
from launcher.backends import AttemptFacts, Event, Refusal, journal
from launcher.backends.journal import Outcome, SupervisorPhase, SupervisorRecord, Wish
from launcher.backends.processes import describe, family, is_stopped, stop_family
from launcher.backends.run_logs import logged_attempts, read_log_file
from launcher.errors import BackendError
from launcher.places import local_root
from launcher.profiles import Profile
from launcher.states import BackendFacts, Phase

_POLL_S = 0.1
# Beyond the attempt's own grace: time for the sweep, and for a supervisor that sleeps to notice.
_CANCEL_SLACK_S = 60.0

_PHASES = {
    SupervisorPhase.STARTING: Phase.QUEUED,
    SupervisorPhase.RUNNING: Phase.EXECUTING,
    SupervisorPhase.BACKING_OFF: Phase.BACKING_OFF,
    SupervisorPhase.STOPPING: Phase.STOPPING,
}
_FOR_GOOD = {
    Outcome.SUCCEEDED: Phase.COMPLETED,
    Outcome.FAILED: Phase.FAILED,
    Outcome.CANCELLED: Phase.CANCELLED,
}


class LocalBackend:
    """The backend ``local``.

    Args:
        profile: its ``root`` is the folder that holds the run directories.
        command: what an attempt executes; empty for ``python -m influence.train --run-dir DIR``. Anything
            else must honour the run directory as the trainer does.
    """

    name = "local"

    def __init__(self, profile: Profile, command: Sequence[str] = ()) -> None:
        self.root = local_root(profile.root)
        self._command = list(command)

    def refusal(self, run: RunSpec) -> Refusal | None:
        from influence.machine import this_machine
        from launcher.machine import lacking

        missing = lacking(run.spec, this_machine(self.root))
        if not self._command:  # what attempts execute is this interpreter's trainer
            missing += lacking_packages()
        return Refusal(missing, str(run.spec["hardware"]["device"])) if missing else None

    def document(self, run: str) -> RunSpec | None:
        try:
            return read_run(RunPaths.of(self.root, run))
        except NotARunError:
            return None

    def submit(self, run: RunSpec) -> bool:
        from launcher.backends.detach import Answer, start_supervisor

        paths = RunPaths.of(self.root, run.run)
        create_run(paths, run)
        record = journal.read_last_word(paths)
        if record is not None and _elsewhere(record):
            raise BackendError(
                f"run '{paths.name}' is supervised on another machine, {record.host}",
                why="two supervisors of one run would take the run from each other",
                next_step=f"submit there; or, when {record.host} is gone for good, remove "
                f"{paths.supervisor_json} and submit here",
            )
        if self._facts(paths).phase is Phase.SUSPENDED:
            return False  # under way; `resume` lets it go on
        answer = start_supervisor(paths, withdraw=_standing(paths), command=self._command)
        return answer is Answer.READY

    def get(self, run: str) -> BackendFacts:
        try:
            return self._facts(RunPaths.of(self.root, run))
        except RunDirError as error:
            return BackendFacts(backend=self.name, phase=Phase.UNREACHABLE, reason=str(error))

    def list(self) -> dict[str, BackendFacts]:
        return {name: self.get(name) for name in run_names(self.root)}

    def attempts(self, run: str) -> Sequence[int]:
        return logged_attempts(RunPaths.of(self.root, run))

    def read_log(self, run: str, attempt: int, offset_bytes: int) -> bytes:
        return read_log_file(RunPaths.of(self.root, run), attempt, offset_bytes)

    def history(self, run: str) -> Sequence[AttemptFacts]:
        from launcher.backends.local_history import attempt_facts

        return attempt_facts(RunPaths.of(self.root, run))

    def events(self, run: str) -> Sequence[Event]:
        from launcher.backends.local_history import events

        return events(RunPaths.of(self.root, run))

    def cancel(self, run: str, *, timeout_s: float | None = None) -> BackendFacts:
        return self._stop(run, Wish.CANCEL, timeout_s)

    def suspend(self, run: str, *, timeout_s: float | None = None) -> BackendFacts:
        facts = self._facts(RunPaths.of(self.root, run))
        return facts if facts.phase is Phase.CANCELLED else self._stop(run, Wish.SUSPEND, timeout_s)

    def resume(self, run: str) -> BackendFacts:
        from launcher.backends.detach import start_supervisor

        paths = RunPaths.of(self.root, run)
        standing = journal.standing_request(paths, Wish.SUSPEND)
        if standing is not None and self._facts(paths).phase is Phase.STOPPING:
            self.suspend(run)  # it is about to be: wait for that
        if standing is not None and self._facts(paths).phase is Phase.SUSPENDED:
            start_supervisor(paths, withdraw={Wish.SUSPEND: standing}, resume=True, command=self._command)
        return self._facts(paths)

    def _stop(self, run: str, wish: Wish, timeout_s: float | None) -> BackendFacts:
        """Ask for an end of the run and wait until nothing of it is left, or time is up."""
        paths = RunPaths.of(self.root, run)
        facts = self._facts(paths)
        if facts.phase in (Phase.COMPLETED, Phase.FAILED):
            return facts
        grace_s = float(read_run(paths).spec["retry"]["grace_period_s"])
        journal.request(paths, wish)
        deadline = time.monotonic() + (grace_s + _CANCEL_SLACK_S if timeout_s is None else timeout_s)
        told = None
        while True:
            record = journal.read_last_word(paths)
            if record is not None and _elsewhere(record):
                pass  # it looks for requests by itself; here nobody can signal it
            elif record is not None and record.alive():
                if told != record.process:  # once each: a new one may have started in between
                    told = record.process
                    _tell_to_stop(record)
            elif self._sweep(paths, record, grace_s):
                return self._facts(paths)
            if time.monotonic() >= deadline:
                return self._facts(paths)
            time.sleep(_POLL_S)

    def _sweep(self, paths: RunPaths, record: SupervisorRecord | None, grace_s: float) -> bool:
        """Without a supervisor: end what it left. False while another process holds the run."""
        from launcher.backends.attempt import marker  # subprocess is not for `status`

        with journal.run_lock(paths) as free:
            if not free:
                return False
            leader = record.attempt if record is not None and record.on_this_machine() else None
            mark = marker(paths)
            left = stop_family(lambda: family(mark), leader=leader, grace_s=grace_s)
            if left:
                raise BackendError(
                    f"processes of run '{paths.name}' survive SIGKILL: {describe(left)}",
                    why="they wait for I/O that does not return",
                    next_step="see `ps -o pid,stat,wchan:30,cmd -p PID`, then cancel again",
                )
            return True

    def _facts(self, paths: RunPaths) -> BackendFacts:
        if not paths.root_dir.is_dir():
            return BackendFacts(backend=self.name, phase=Phase.ABSENT, reason=f"no run in {self.root}")
        record = journal.read_last_word(paths)
        phase, reason = _phase(record, _standing(paths))
        return BackendFacts(
            backend=self.name, phase=phase, reason=reason,
            num_charged=record.num_charged if record else None,
            started_at=record.started_at if record else None,
        )  # fmt: skip


def _standing(paths: RunPaths) -> dict[Wish, str]:
    """The requests that stand, with their ids."""
    found = ((wish, journal.standing_request(paths, wish)) for wish in Wish)
    return {wish: request for wish, request in found if request is not None}


def _phase(record: SupervisorRecord | None, standing: Collection[Wish]) -> tuple[Phase, str]:
    if record is None:
        if Wish.CANCEL in standing:
            return Phase.CANCELLED, "cancelled before it started"
        if Wish.SUSPEND in standing:
            return Phase.SUSPENDED, "suspended before it started"
        return Phase.NEVER_STARTED, "created, and no supervisor has started yet"
    if record.outcome in _FOR_GOOD:
        return _FOR_GOOD[record.outcome], record.reason
    if record.outcome is None and _elsewhere(record):
        return Phase.UNREACHABLE, f"its supervisor runs on {record.host}; ask there"
    if record.outcome is not None or not record.alive():
        if Wish.CANCEL in standing:
            return Phase.CANCELLED, "cancelled"
        if Wish.SUSPEND in standing:
            return Phase.SUSPENDED, "suspended"
        if record.outcome is Outcome.SUSPENDED:
            return Phase.LOST, "it was suspended, and nothing lets it go on though it was asked to"
        if record.outcome is not None:
            return Phase.LOST, record.reason
        return (
            Phase.LOST,
            f"its supervisor (process {record.pid}) is gone: killed, or the machine was restarted",
        )
    if is_stopped(record.pid):
        return Phase.STUCK, f"its supervisor is stopped; `kill -CONT {record.pid}` lets it go on"
    for wish, words in ((Wish.CANCEL, "cancel is under way"), (Wish.SUSPEND, "it is being suspended")):
        if wish in standing:
            return Phase.STOPPING, words
    reason = record.reason
    if record.phase is SupervisorPhase.BACKING_OFF and record.next_attempt_at is not None:
        wait_s = parse_time(record.next_attempt_at).timestamp() - time.time()
        reason += f" in {max(0.0, wait_s):.0f} s"
    return _PHASES[record.phase], reason


def _elsewhere(record: SupervisorRecord) -> bool:
    return record.outcome is None and not record.on_this_machine()


def _tell_to_stop(record: SupervisorRecord) -> None:
    import signal

    if record.process.send(signal.SIGTERM):
        record.process.send(signal.SIGCONT)  # one that was stopped could not hear it


def run_names(root: Path) -> list[str]:
    """The directories below the root, by name; hidden ones are none of ours.

    Raises:
        StorageError: the root cannot be listed. One that is not there holds no run.
    """
    try:
        return sorted(
            p.name for p in root.iterdir() if not p.name.startswith(".") and (p.is_dir() or p.is_symlink())
        )
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError.from_os_error(error, root, "listing") from None


def lacking_packages() -> list[str]:
    """The trainer's extra, where this interpreter lacks it; the trainer itself checks more closely."""
    from importlib.util import find_spec

    absent = [name for name in ("torch", "verl", "ray") if find_spec(name) is None]
    if not absent:
        return []
    return [f"the packages {', '.join(absent)}; install them: pip install 'influence-launcher[trainer]'"]
