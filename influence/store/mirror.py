"""Sending what an attempt writes on this machine to the store, while it goes on writing.

Two lines of work, which a caller runs beside each other: commits with the small files, and checkpoints, which
are large and wait for the commits of their steps. Nothing here starts a thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from influence.rundir import Attempt, CommitRecord, CorruptError, RunDirError
from influence.rundir.files import open_inside, read_inside
from influence.rundir.record import read_record
from influence.store import checkpoints
from influence.store.commits import publish
from influence.store.run_store import RunStore

_MAX_RECORD_BYTES = 2**20
_TEXTS_EVERY_S = 30.0
# A growing log is sent whole each time: the larger, the rarer, so that it takes about this much traffic.
_TEXT_BYTES_PER_S = 2**20

Checkpoint = tuple[int, Path]
"""A finished checkpoint's step and folder."""


class CommitMirror:
    """Commits, in the order in which they were made, and the attempt's record, log and metrics."""

    def __init__(self, run: RunStore, attempt: Attempt) -> None:
        self._run = run
        self._attempt = attempt
        self._settled: set[Path] = set(_records(run, attempt.number))
        self._sent_record = b""
        self._sent_sizes: dict[Path, int] = {}
        self._texts_due_at = 0.0

    def send(self) -> None:
        """Everything that is new and due.

        Raises:
            FencedError: a later attempt has begun, in the store or on this machine.
            StoreError, CorruptError, StorageError: as `publish`.
        """
        self.send_commits()
        if time.monotonic() >= self._texts_due_at:
            self._run.require_unfenced(self._attempt.number)
            self.send_texts()
            self._texts_due_at = time.monotonic() + max(
                _TEXTS_EVERY_S, sum(self._sent_sizes.values()) / _TEXT_BYTES_PER_S
            )

    def send_commits(self) -> None:
        """The commits that the store does not have yet; raises as `send`."""
        for path, record in self._waiting():
            self._send_record()
            publish(self._run, self._attempt, record)
            self._settled.add(path)

    def send_texts(self) -> None:
        """The attempt's record, log and metrics as they are now; own files, which no fence forbids.

        Raises:
            StoreError, StorageError.
        """
        self._send_record()
        paths, number = self._run.paths, self._attempt.number
        for path in (paths.log(number), paths.metrics(number)):
            size = path.stat().st_size if path.is_file() else 0
            if size != self._sent_sizes.get(path, 0):
                with open_inside(paths.root_dir, path) as stream:
                    data = stream.read(size)  # what is there now; it may grow while it is sent
                self._run.objects.put(self._run.key(path), data)
                self._sent_sizes[path] = len(data)

    def unsent_steps(self) -> list[int]:
        """The steps that are committed on this machine only."""
        return [record.step for _, record in self._waiting()]

    def _waiting(self) -> list[tuple[Path, CommitRecord]]:
        records = _records(self._run, self._attempt.number)
        new = [(path, records[path]) for path in records if path not in self._settled]
        waiting = []
        for path, (step, replay_of) in new:
            record = read_record(self._run.paths, step, replay_of)
            waiting.append((path, record))
        return sorted(waiting, key=lambda item: item[1].step)

    def _send_record(self) -> None:
        path = self._run.paths.attempt(self._attempt.number)
        data = read_inside(self._run.paths.root_dir, path, max_bytes=_MAX_RECORD_BYTES)
        if data != self._sent_record:
            self._run.objects.put(self._run.key(path), data)
            self._sent_record = data


def _records(run: RunStore, attempt: int) -> dict[Path, tuple[int, int | None]]:
    """The records of first commits here, and of an attempt's replays: path to step, and whose replay."""
    paths = run.paths
    found: dict[Path, tuple[int, int | None]] = {
        paths.step_record(step): (step, None) for step in paths.committed_step_numbers()
    }
    for step in paths.replayed_step_numbers().get(attempt, []):
        found[paths.replay_record(attempt, step)] = (step, attempt)
    return found


class CheckpointMirror:
    """The newest checkpoint that is finished and whose steps are committed in the store.

    Args:
        newest: verl's newest finished checkpoint.
        keep: how many complete ones the store holds.
    """

    def __init__(
        self,
        run: RunStore,
        attempt: Attempt,
        commits: CommitMirror,
        newest: Callable[[], Checkpoint | None],
        keep: int,
    ) -> None:
        self._run = run
        self._attempt = attempt
        self._commits = commits
        self._newest = newest
        self._keep = keep
        self._sent_step = attempt.record.resumed_from

    def send(self) -> None:
        """The newest checkpoint, unless it is there; then remove older ones.

        Raises:
            FencedError: a later attempt has begun. StoreError, StorageError.
        """
        waiting = self._waiting()
        if waiting is None or any(step <= waiting[0] for step in self._commits.unsent_steps()):
            return
        step, folder = waiting
        self._run.require_unfenced(self._attempt.number)
        if checkpoints.send(self._run, self._attempt.number, step, folder, lambda: self._newest() == waiting):
            self._sent_step = step
            self._run.require_unfenced(self._attempt.number)
            checkpoints.prune(self._run, self._attempt.number, self._keep)

    def unsent_step(self) -> int | None:
        """The step whose checkpoint lies on this machine only."""
        try:
            waiting = self._waiting()
        except (CorruptError, RunDirError):
            return None
        return waiting[0] if waiting else None

    def _waiting(self) -> Checkpoint | None:
        newest = self._newest()
        # Up to the step that it resumed from, checkpoints are another attempt's.
        if newest is None or newest[0] <= max(self._sent_step, self._attempt.record.resumed_from):
            return None
        return newest
