"""What the local backend writes about a run: who supervises it, what happened, and who asked to stop it.

In the run directory's ``local/``::

    supervisor.json   the supervisor's own word about now: replaced atomically at each change
    events.jsonl      history: one JSON object a line, appended and synced; a torn last line is skipped
    cancel            a request to cancel, which stays: a cancelled run is one with this file
    suspend           a request to suspend, which stays until the run is resumed

Reading is cheap (standard library only), since ``status`` reads them for every run.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from influence.rundir import CorruptError, RunPaths
from influence.rundir.clock import parse_time, utc_now
from influence.rundir.fields import Fields
from influence.rundir.files import make_dir, read_json, remove_temporaries, write_json
from launcher.backends.processes import ProcessId, boot_id

_LABEL = "supervisor"  # of temporary files that only a supervisor writes


class SupervisorPhase(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    BACKING_OFF = "backing off"
    STOPPING = "stopping"
    ENDED = "ended"


class Outcome(StrEnum):
    """How a supervisor ended its work."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SUSPENDED = "suspended"  # by request, with the retries that it had
    STOPPED = "stopped"  # by a signal without a request to cancel: a shutdown; the run can go on


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorRecord:
    """The content of ``supervisor.json``."""

    pid: int
    start_token: str
    boot_id: str
    host: str
    started_at: str
    phase: SupervisorPhase
    reason: str
    attempt_pid: int | None = None
    attempt_start_token: str | None = None
    num_charged: int = 0
    num_idle: int = 0
    """Retries in a row since the last new step; with the former what a resumed run goes on with."""
    next_attempt_at: str | None = None
    """ISO 8601, UTC; while backing off."""
    outcome: Outcome | None = None
    ended_at: str | None = None

    @property
    def process(self) -> ProcessId:
        return ProcessId(self.pid, self.start_token)

    @property
    def attempt(self) -> ProcessId | None:
        """The trainer's first process, while one runs."""
        if self.attempt_pid is None or self.attempt_start_token is None:
            return None
        return ProcessId(self.attempt_pid, self.attempt_start_token)

    def on_this_machine(self) -> bool:
        """Whether the supervisor ran here, so that its process number means something.

        The host's name covers a reboot (another boot id), the boot id a container that was made again
        under another name.
        """
        return self.host == os.uname().nodename or self.boot_id == boot_id()

    def alive(self) -> bool:
        """Whether the supervisor still runs on this machine."""
        return self.on_this_machine() and self.process.alive()


def write_supervisor(paths: RunPaths, record: SupervisorRecord) -> None:
    """Replace ``supervisor.json``.

    Raises:
        StorageError: the disk is full, read-only, ...
    """
    write_json(paths.supervisor_json, asdict(record), label=_LABEL)


def remove_leftovers(paths: RunPaths) -> None:
    """Remove what a supervisor that died while writing left; for the holder of the lock only."""
    remove_temporaries(paths.local_dir, {_LABEL})


def read_supervisor(paths: RunPaths) -> SupervisorRecord | None:
    """The latest supervisor's word; None when no supervisor has ever started.

    Raises:
        CorruptError: the file is not what a supervisor writes.
    """
    try:
        return _parsed(paths, read_json(paths.supervisor_json))
    except FileNotFoundError:
        return None
    except CorruptError as error:
        next_step = (
            "see that no supervisor of it runs (pgrep -af "
            f"'launcher.backends.supervisor.*{paths.name}'), remove this file, and repeat the command"
        )
        raise CorruptError(paths.supervisor_json, error.reason, next_step) from error


def read_last_word(paths: RunPaths) -> SupervisorRecord | None:
    """As `read_supervisor`, with the end that a supervisor could append to the history only.

    A full disk lets small appends through where a file cannot be replaced any more.
    """
    record = read_supervisor(paths)
    if record is None or record.outcome is not None or record.alive():
        return record
    with suppress(OSError):  # the history is a help, not the record
        for event in reversed(read_events(paths)):
            if event.get("event") != "run_ended":
                continue
            with suppress(KeyError, TypeError, ValueError):
                if parse_time(event["at"]) < parse_time(record.started_at):
                    break
                return replace(
                    record, phase=SupervisorPhase.ENDED, outcome=Outcome(event["outcome"]),
                    reason=str(event["reason"]), ended_at=event["at"],
                )  # fmt: skip
    return record


def _parsed(paths: RunPaths, document: Any) -> SupervisorRecord:
    read = Fields(document, paths.supervisor_json)
    try:
        outcome = read.text_or_none("outcome")
        next_attempt_at = read.text_or_none("next_attempt_at")
        return SupervisorRecord(
            pid=read.integer("pid", minimum=1),
            start_token=read.text("start_token"),
            boot_id=read.text("boot_id"),
            host=read.text("host"),
            started_at=read.time("started_at"),
            phase=SupervisorPhase(read.text("phase")),
            reason=read.text("reason"),
            attempt_pid=read.integer_or_none("attempt_pid", minimum=1),
            attempt_start_token=read.text_or_none("attempt_start_token"),
            num_charged=read.integer("num_charged"),
            num_idle=read.integer_or_none("num_idle", minimum=0) or 0,
            next_attempt_at=None if next_attempt_at is None else read.time("next_attempt_at"),
            outcome=None if outcome is None else Outcome(outcome),
            ended_at=read.text_or_none("ended_at"),
        )
    except ValueError as error:
        raise read.error(str(error)) from None


def append_event(paths: RunPaths, event: str, **facts: Any) -> None:
    """Add a line to ``events.jsonl`` and sync it."""
    line = (
        json.dumps({"at": utc_now(), "event": event, **facts}, sort_keys=True, allow_nan=False).encode()
        + b"\n"
    )
    descriptor = os.open(paths.events_jsonl, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line  # a line torn by a power cut must not swallow this one
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_events(paths: RunPaths) -> list[dict[str, Any]]:
    """The history, oldest first; lines that are torn or no JSON objects are left out."""
    try:
        text = paths.events_jsonl.read_bytes()
    except FileNotFoundError:
        return []
    events = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


class Wish(StrEnum):
    """What a person can ask of a run that has a supervisor; the file that asks for it has this name."""

    CANCEL = "cancel"
    SUSPEND = "suspend"


def request(paths: RunPaths, wish: Wish) -> str:
    """Leave a request, once; returns its id, which may be that of an earlier request."""
    standing = standing_request(paths, wish)
    if standing is not None:
        return standing
    import uuid  # not for `status`

    make_dir(paths.local_dir)
    document: Mapping[str, str] = {
        "id": uuid.uuid4().hex,
        "requested_at": utc_now(),
        "host": os.uname().nodename,
    }
    try:
        write_json(_file(paths, wish), dict(document), exclusive=True)
    except FileExistsError:
        return request(paths, wish)
    return document["id"]


def standing_request(paths: RunPaths, wish: Wish) -> str | None:
    """The id of the standing request, if there is one.

    A file that does not parse is a request all the same: better to stop than to go on against a wish.
    """
    try:
        document = read_json(_file(paths, wish))
    except FileNotFoundError:
        return None
    except CorruptError:
        return "unreadable"
    return str(document.get("id", "unreadable")) if isinstance(document, dict) else "unreadable"


def withdraw(paths: RunPaths, wish: Wish, request_id: str) -> None:
    """Take back a request, if it is still that one; for the holder of the lock only."""
    if standing_request(paths, wish) == request_id:
        _file(paths, wish).unlink(missing_ok=True)


def _file(paths: RunPaths, wish: Wish) -> Path:
    return paths.cancel_file if wish is Wish.CANCEL else paths.suspend_file


@contextmanager
def run_lock(paths: RunPaths) -> Iterator[bool]:
    """Hold the right to act for this run, on this machine; yields whether it was free.

    The lock is ``flock`` on the directory ``local/``: it ends with its holder, however that dies, and
    attempts do not inherit it.
    """
    make_dir(paths.local_dir)
    descriptor = os.open(paths.local_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
