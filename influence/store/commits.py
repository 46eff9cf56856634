"""Committing a step in the store: the same promise as on a disk, with put-if-absent in place of rename.

::

    fence -> announcement, the attempt's own -> NPZ, if absent -> fence -> the record, if absent

An NPZ in the store is never written over. Where one lies without its record, its attempt was killed or hangs;
the announcement, which was there before it, holds that record. So whoever meets such an NPZ writes the record
in that attempt's stead, with the same bytes, and goes on: the step is committed, once, and nothing is lost.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from influence.rundir import Attempt, CommitRecord, CorruptError
from influence.rundir.files import json_bytes, read_inside
from influence.store.run_store import RunStore, parse_record


def publish(run: RunStore, attempt: Attempt, record: CommitRecord) -> CommitRecord:
    """Commit in the store what an attempt committed on this machine; to repeat it changes nothing.

    Returns:
        The record as the store has it: where another attempt was first, that of a replay.

    Raises:
        FencedError: a later attempt has begun; nothing of this commit is visible then.
        CorruptError: what lies in the store cannot be a commit of this run.
        StoreError: the store does not take it.
        StorageError: this machine's file cannot be read.
    """
    if not record.replay and _publish_first(run, attempt, record):
        return record
    return _publish_replay(run, attempt, record)


def _publish_first(run: RunStore, attempt: Attempt, record: CommitRecord) -> bool:
    """The step's first commit; False where another attempt has made that."""
    paths = run.paths
    path = paths.step_record(record.step)
    committed = run.record(path)
    if committed is not None:
        return committed == record
    data = json_bytes(record.to_dict(), path)
    run.require_unfenced(attempt.number)
    run.objects.put(run.announcement(record), data)
    try:
        run.objects.create(run.key(paths.step_npz(record.step)), _npz(run, record))
    except FileExistsError:
        finish_announced(run, record.step)
    else:
        run.require_unfenced(attempt.number)
        with suppress(FileExistsError):  # of an attempt that announced the same NPZ
            run.objects.create(run.key(path), data)
    # The record is there: nobody needs what was announced for this step, by whichever attempt.
    run.objects.delete([entry.key for entry in run.announcements(record.step)])
    return run.record(path) == record


def finish_announced(run: RunStore, step: int) -> None:
    """Write the record of an NPZ that lies without one, as its attempt announced it.

    Raises:
        CorruptError: no attempt announced these bytes.
    """
    paths = run.paths
    path, npz_path = paths.step_record(step), paths.step_npz(step)
    if run.record(path) is not None:
        return
    digest = run.objects.digest(run.key(npz_path))
    for entry in run.announcements(step):
        try:
            data = run.objects.read(entry.key)
        except FileNotFoundError:
            continue  # its attempt has just committed the step
        announced = parse_record(data, path)
        if (announced.sha256, announced.bytes) == digest and announced.step == step:
            with suppress(FileExistsError):  # somebody else was quicker
                run.objects.create(run.key(path), data)
            return
    if run.record(path) is None:
        raise CorruptError(
            npz_path,
            f"lies in {run.objects.url} without a record, and no attempt announced it",
            "move that object away; then the step is computed again",
        )


def _publish_replay(run: RunStore, attempt: Attempt, record: CommitRecord) -> CommitRecord:
    """A commit of a step that another attempt committed before; beside it, never over it."""
    paths = run.paths
    first = run.record(paths.step_record(record.step))
    if first is None:
        raise CorruptError(
            paths.step_record(record.step),
            f"is not in {run.objects.url}, and was",
            "restore it from a copy; what replays it depends on it",
        )
    replay = replace(record, replay=True, equal=_has_equal_npz(run, first, record))
    path = replay.path(paths)
    data = json_bytes(replay.to_dict(), path)
    run.require_unfenced(attempt.number)
    if not replay.equal:
        run.objects.put(run.key(replay.npz(paths)), _npz(run, record))
        run.require_unfenced(attempt.number)
    try:
        run.objects.create(run.key(path), data)
    except FileExistsError:
        raise CorruptError(path, f"lies in {run.objects.url} with other content") from None
    return replay


def _has_equal_npz(run: RunStore, first: CommitRecord, record: CommitRecord) -> bool:
    """Whether the first commit's NPZ can serve for this one: same bytes, and there."""
    if (first.sha256, first.bytes) != (record.sha256, record.bytes):
        return False
    try:
        return run.objects.size(run.key(first.npz(run.paths))) == record.bytes
    except FileNotFoundError:
        return False


def _npz(run: RunStore, record: CommitRecord) -> bytes:
    """The NPZ that this machine committed."""
    path = record.npz(run.paths)
    try:
        return read_inside(run.paths.root_dir, path, max_bytes=record.bytes)
    except FileNotFoundError:
        raise CorruptError(path, "is not there, though its record is") from None
