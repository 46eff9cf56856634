"""Running the child: its output to two places, signals passed on, and nothing of it left behind."""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# Found before any fork: in the child of a process with threads, a lookup could wait for a lock for ever.
_PRCTL = ctypes.CDLL(None, use_errno=True).prctl
_CHUNK_BYTES = 2**16
_KILL_WAIT_S = 10.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Ending:
    """How the child ended."""

    exit_code: int
    """0..255; 128 + n where signal n killed it."""
    stop_signal: signal.Signals | None
    """The signal that told us to stop, if one did."""
    last_words: str
    """What the child gave as its reason, one line; empty if it gave none."""


class StopSignals:
    """Notes SIGTERM and SIGINT from its construction on, so that none is lost before there is a child."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.received_at_s: float | None = None
        """Of `time.monotonic`."""
        self._is_asked = False
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.received_at_s = signal.Signals(number), time.monotonic()

    def stop(self) -> None:
        """End the child as a signal would; from any thread."""
        self._is_asked = True
        with suppress(BlockingIOError):  # full: it will wake up anyway
            os.write(self._writer, b"\0")

    @property
    def is_stopping(self) -> bool:
        """Whether a signal or `stop` has said that the child is to end."""
        return self._is_asked or self.received is not None

    def fileno(self) -> int:
        return self._reader

    def drain(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._reader, 4096)


def become_subreaper() -> None:
    """Adopt whatever descendants lose their parent, so that `end_descendants` finds them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def run_child(
    command: Sequence[str],
    environment: Mapping[str, str],
    write: Callable[[bytes], None],
    signals: StopSignals,
    grace_s: float,
) -> Ending:
    """Run a command to its end, and pass what it prints to ``write``.

    It has a process group of its own, and dies with this process. On SIGTERM, SIGINT or `StopSignals.stop` it
    gets SIGTERM, and after ``grace_s`` its group gets SIGKILL.

    Args:
        command: gets ``--reason-fd N``: a descriptor that it may write one line to.
    """
    reason_reader, reason_writer = os.pipe()
    parent = os.getpid()
    child = subprocess.Popen(  # noqa: S603  the command is our own, as a list
        [*command, "--reason-fd", str(reason_writer)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        pass_fds=[reason_writer],
        process_group=0,
        preexec_fn=lambda: _die_with_parent(parent),
    )
    os.close(reason_writer)
    assert child.stdout is not None  # noqa: S101  (asked for above)
    output, pidfd = child.stdout.fileno(), os.pidfd_open(child.pid)
    os.set_blocking(output, False)
    selector = selectors.DefaultSelector()
    for descriptor in (output, pidfd, signals.fileno()):
        selector.register(descriptor, selectors.EVENT_READ)
    kill_at: float | None = None
    while child.poll() is None:
        if signals.is_stopping and kill_at is None:
            child.terminate()
            kill_at = time.monotonic() + grace_s
        if kill_at is not None and time.monotonic() >= kill_at:
            _kill_group(child.pid)
            kill_at = float("inf")
        timeout_s = None if kill_at in (None, float("inf")) else max(0.0, kill_at - time.monotonic())
        for key, _ in selector.select(timeout_s):
            if key.fd == output and not _copy(output, write):
                selector.unregister(output)
            elif key.fd == signals.fileno():
                signals.drain()
    _kill_group(child.pid)
    while _copy(output, write):  # what is still in the pipe; others may hold its other end
        pass
    last_words = _read_available(reason_reader)
    selector.close()
    for descriptor in (pidfd, reason_reader):
        os.close(descriptor)
    child.stdout.close()
    code = child.returncode
    return Ending(128 - code if code < 0 else code, signals.received, last_words)


def end_descendants() -> int:
    """Kill every process below this one, and wait until they are gone.

    Returns:
        How many would not go within some seconds, as happens in uninterruptible I/O.
    """
    give_up_at = time.monotonic() + _KILL_WAIT_S
    while True:
        _reap()
        left = _descendants(os.getpid())
        if not left or time.monotonic() >= give_up_at:
            return len(left)
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def _copy(descriptor: int, write: Callable[[bytes], None]) -> bool:
    """Pass on what can be read now; False when there is nothing, or nothing more."""
    try:
        chunk = os.read(descriptor, _CHUNK_BYTES)
    except BlockingIOError:
        return False
    write(chunk)
    return bool(chunk)


def _read_available(descriptor: int) -> str:
    os.set_blocking(descriptor, False)
    try:
        return os.read(descriptor, 4096).decode("utf-8", "replace").strip()
    except BlockingIOError:
        return ""


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _die_with_parent(parent: int) -> None:
    """In the child, before it executes: SIGKILL when the parent's death leaves it alone."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(128 + signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if _PRCTL(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def _descendants(ancestor: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # After the command's name, which stands in parentheses and may hold anything: state, parent.
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue  # it has just ended
        if state != "Z":
            children.setdefault(int(parent), []).append(int(entry.name))
    found: list[int] = []
    queue = [ancestor]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found
