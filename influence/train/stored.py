"""A run whose home is an object store: restored to this machine, claimed there, mirrored while it runs.

The parent imports this only where `INFL_STORE_URL` is set. The mirror is two threads of the parent: what they
do is waiting and reading files, and the parent itself only passes the child's output on.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from influence.rundir import (
    Attempt,
    AttemptRecord,
    ConflictError,
    RunDirError,
    RunPaths,
    RunSpec,
    TrainerExit,
    difference,
    missing_steps,
)
from influence.store import checkpoints
from influence.store.errors import StoreConfigError
from influence.store.mirror import CheckpointMirror, CommitMirror
from influence.store.objects import PATIENCE_S
from influence.store.restore import Restore
from influence.store.run_store import RunStore
from influence.train.process import StopSignals
from influence.train.refusal import Refusal, refusal_of

PATIENCE_VARIABLE = "INFL_STORE_PATIENCE_S"
"""Environment variable with the seconds that a store may be away before the attempt ends."""

_POLL_S = 1.0
_LOOK_S = 0.2
_END_S = 4.0
_MARGIN_S = 1.0

_T = TypeVar("_T")


class StoredRun:
    """One attempt's dealings with the store.

    Raises:
        Refusal, StoreConfigError: the environment names no store that can be used.
    """

    def __init__(self, url: str, paths: RunPaths, environment: Mapping[str, str] = os.environ) -> None:
        self._run = RunStore.of(url, paths, patience_s=_patience_s(environment))
        self._restore = Restore(self._run)
        self._commits: CommitMirror | None = None
        self._checkpoints: CheckpointMirror | None = None
        self._workers: list[_Worker] = []

    def fetch(self) -> None:
        """What the store holds of the run, without the checkpoints; raises as `Restore.fetch`."""
        self._restore.fetch()

    def publish_run(self, spec: RunSpec) -> None:
        """Put ``run.json`` there, or compare with the one that is; and see that the store is fit for runs.

        Raises:
            ConflictError: another run has this name. StoreConfigError: two attempts could not be told apart.
            Refusal: the run's checkpoints are out of this process's reach.
        """
        if spec.spec.get("hardware", {}).get("nodes", 1) != 1:
            raise Refusal(
                TrainerExit.CONFIG,
                "hardware.nodes is more than 1, and with an object store each node would keep its part of a "
                "checkpoint to itself; use cluster.storage: claim",
            )
        objects, paths = self._run.objects, self._run.paths
        key = self._run.key(paths.run_json)
        with suppress(FileExistsError):
            objects.create(key, paths.run_json.read_bytes())
        data = objects.read(key)
        existing = RunSpec.from_dict(_parsed(data), paths.run_json)
        if existing.spec_hash != spec.spec_hash:
            raise ConflictError(paths.run_json, difference(existing.spec, spec.spec))
        if objects.ignores_conditions(key, data):
            raise StoreConfigError(
                objects.url,
                "the store writes over an object although it is asked not to (If-None-Match), so two "
                "attempts could not be told apart",
                "use a store that knows conditional puts, or cluster.storage: claim",
            )

    def reserve(self, record: AttemptRecord) -> bool:
        """Claim an attempt's number in the store; False: it is taken."""
        return self._run.reserve(record)

    def take_over(
        self, attempt: Attempt, total_steps: int, signals: StopSignals, say: Callable[[str], None]
    ) -> list[int]:
        """After the claim: what lower attempts have committed until now, and a checkpoint to go on from.

        Returns:
            The steps that are missing.

        Raises:
            Refusal: SIGTERM came. StoreError, StorageError, CorruptError.
        """

        def work() -> list[int]:
            self._restore.fetch()
            self._restore.finish_announced()
            missing = missing_steps(self._run.paths, total_steps)
            if missing:
                step = checkpoints.restore(self._run, missing[0], say, lambda: signals.is_stopping)
                say(
                    f"from {self._run.objects.url}: {total_steps - len(missing)} steps committed, "
                    + (f"checkpoint of step {step}" if step else "no checkpoint")
                )
            return missing

        return _while_listening(work, signals)

    def start(
        self,
        attempt: Attempt,
        newest_checkpoint: Callable[[], Any],
        keep_checkpoints: int,
        signals: StopSignals,
    ) -> None:
        """Begin to mirror; trouble that ends the run asks the child to stop."""
        self._commits = CommitMirror(self._run, attempt)
        self._checkpoints = CheckpointMirror(
            self._run, attempt, self._commits, newest_checkpoint, keep_checkpoints
        )
        self._workers = [_Worker(mirror.send, signals.stop) for mirror in (self._commits, self._checkpoints)]
        for worker in self._workers:
            worker.start()

    def trouble(self) -> Refusal | None:
        """What the store said that ended the attempt."""
        errors = [worker.trouble for worker in self._workers if worker.trouble is not None]
        return _refusal_in_flight(errors[0]) if errors else None

    def settle(self, code: int, reason: str, signals: StopSignals, grace_s: float) -> tuple[int, str]:
        """Send what is left, and say what could not be sent.

        Without a signal it takes as long as the store answers; with one, until shortly before ``grace_s``
        after it, when SIGKILL would come.

        Returns:
            Exit code and reason: a run is done only when the store has every step.
        """
        for worker in self._workers:  # the checkpoints' comes last: it waits for the commits
            worker.finish()
            self._await(worker, lambda: _seconds_left(signals, grace_s, _END_S + _MARGIN_S))
        trouble, unsent_steps = self.trouble(), self._commits.unsent_steps() if self._commits else []
        if code == TrainerExit.OK and (trouble or unsent_steps):
            code = trouble.code if trouble else TrainerExit.RETRY
            reason = trouble.reason if trouble else "the store did not take every step in time"
        unsent = [f"step {step}" for step in unsent_steps]
        if self._checkpoints and (step := self._checkpoints.unsent_step()):
            unsent.append(f"the checkpoint of step {step}")
        return code, f"{reason}; not in the store: {', '.join(unsent)}" if unsent else reason

    def send_end(self, attempt: Attempt, signals: StopSignals, grace_s: float) -> bool:
        """The attempt's record, log and metrics as they are at the end; False where that was not possible."""
        mirror = self._commits or CommitMirror(self._run, attempt)
        worker = _Worker(mirror.send_texts, lambda: None)
        worker.finish()
        worker.start()
        give_up_at = time.monotonic() + _END_S if self.trouble() else float("inf")
        self._await(
            worker, lambda: min(give_up_at - time.monotonic(), _seconds_left(signals, grace_s, _MARGIN_S))
        )
        return not worker.is_alive() and worker.trouble is None

    def _await(self, worker: _Worker, seconds_left: Callable[[], float]) -> None:
        while worker.is_alive() and (left_s := seconds_left()) > 0:
            if left_s != float("inf"):
                self._run.objects.hurry(time.monotonic() + left_s)
            worker.join(_LOOK_S)


class _Worker(threading.Thread):
    """Does its work again and again until told to finish, and then once more."""

    def __init__(self, work: Callable[[], object], on_trouble: Callable[[], None]) -> None:
        super().__init__(daemon=True)  # a store that hangs must not keep the process
        self._work = work
        self._on_trouble = on_trouble
        self._is_over = threading.Event()
        self.trouble: RunDirError | None = None

    def finish(self) -> None:
        self._is_over.set()

    def run(self) -> None:
        try:
            while not self._is_over.wait(_POLL_S):
                self._work()
            self._work()
        except RunDirError as error:
            self.trouble = error
            self._on_trouble()
        except Exception as error:  # a fault of ours, or of the client's
            self.trouble = RunDirError(None, f"mirroring failed: {error!r:.300}", "report this")
            self._on_trouble()


def _while_listening(work: Callable[[], _T], signals: StopSignals) -> _T:
    """Do some work in another thread, and give it up when a signal comes.

    Raises:
        Refusal: SIGTERM came; whatever the work raises.
    """
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive() and not signals.is_stopping:
        thread.join(_LOOK_S)
    if signals.received is not None:
        raise Refusal(TrainerExit.RETRY, f"stopped by {signals.received.name}")
    if errors:
        raise errors[0]
    return results[0]


def _seconds_left(signals: StopSignals, grace_s: float, reserved_s: float) -> float:
    """Until the end of the grace period less what is reserved; for ever where no signal came."""
    if signals.received_at_s is None:
        return float("inf")
    return signals.received_at_s + grace_s - reserved_s - time.monotonic()


def _refusal_in_flight(error: RunDirError) -> Refusal:
    """What an error of the store means while the run goes on: settings that worked are right.

    A key that has expired meanwhile is renewed with the pod, and refused at its start if it is not.
    """
    refusal = refusal_of(error)
    if isinstance(error, StoreConfigError):
        return Refusal(TrainerExit.RETRY, refusal.reason)
    return refusal


def _patience_s(environment: Mapping[str, str]) -> float:
    text = environment.get(PATIENCE_VARIABLE) or str(PATIENCE_S)
    try:
        patience_s = float(text)
    except ValueError:
        patience_s = -1.0
    if not 0 < patience_s < float("inf"):
        raise Refusal(TrainerExit.USAGE, f"{PATIENCE_VARIABLE} is {text!r}; a number of seconds above 0")
    return patience_s


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None  # which `RunSpec.from_dict` refuses
