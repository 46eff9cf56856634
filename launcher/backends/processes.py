"""Processes on this Linux machine: who is who, who descends from whom, and how to stop a whole family.

A process number alone proves nothing, since numbers are reused. A process is therefore known by its
number *and* a start token: the machine's boot id and the clock tick at which the process started
(field 22 of ``/proc/<pid>/stat``). A recorded pair that no longer matches belongs to a dead process.

A family is found in two ways that complement each other. The supervisor is a *child subreaper*
(``prctl(2)``): whatever an attempt leaves behind, daemonised or not, becomes its child. Where the
supervisor itself is gone, processes are found by a marker in their environment, and by descent from
those, because some programs (Ray's workers rename themselves) overwrite theirs.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

# Between the end of a leader and SIGKILL for whoever of its family is still there after a SIGTERM.
SETTLE_S = 5.0
# After SIGKILL a process goes as soon as the kernel lets it; one in uninterruptible I/O may not.
_KILL_WAIT_S = 15.0
_POLL_S = 0.05


def boot_id() -> str:
    """The kernel's identity since its last start; equal in all containers of one kernel."""
    return (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process for certain: its number and its start token."""

    pid: int
    start_token: str

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process that has this number now; None if there is none (a zombie counts as none)."""
        stat = _read_stat(pid)
        return None if stat is None else cls(pid, f"{boot_id()}:{stat.start_ticks}")

    def alive(self) -> bool:
        """Whether this very process still runs."""
        return ProcessId.of(self.pid) == self

    def send(self, signum: signal.Signals) -> bool:
        """Send a signal, and say whether the process was there to get it."""
        if not self.alive():
            return False
        try:
            os.kill(self.pid, signum)
        except ProcessLookupError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class _Stat:
    state: str
    ppid: int
    start_ticks: int


def _read_stat(pid: int) -> _Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # The command's name stands in parentheses and may hold anything, parentheses and spaces too.
    fields = text[text.rfind(b")") + 2 :].split()
    state = fields[0].decode("ascii")
    return None if state in ("Z", "X", "x") else _Stat(state, int(fields[1]), int(fields[19]))


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal (SIGSTOP, Ctrl-Z) and does nothing until SIGCONT."""
    stat = _read_stat(pid)
    return stat is not None and stat.state in ("T", "t")


def family(marker: tuple[str, str], *, under: int | None = None) -> list[ProcessId]:
    """The living processes that belong to a run.

    Args:
        marker: name and value of the environment variable that its processes were started with.
        under: also every descendant of this process (but not it itself).

    Returns:
        Oldest first. Never the caller or one of its ancestors: a shell from which somebody works on
        a run with the same variable exported is no part of the run.
    """
    stats = {int(e.name): s for e in _PROC.iterdir() if e.name.isdigit() and (s := _read_stat(int(e.name)))}
    children: dict[int, list[int]] = {}
    for pid, stat in stats.items():
        children.setdefault(stat.ppid, []).append(pid)
    entry = f"{marker[0]}={marker[1]}".encode()
    found = {pid for pid in stats if _has_variable(pid, entry)}
    if under is not None:
        found.update(children.get(under, ()))
    pending = list(found)
    while pending:
        for child in children.get(pending.pop(), ()):
            if child not in found:
                found.add(child)
                pending.append(child)
    found -= _self_and_ancestors(stats)
    boot = boot_id()
    return [
        ProcessId(pid, f"{boot}:{stats[pid].start_ticks}")
        for pid in sorted(found, key=lambda p: (stats[p].start_ticks, p))
    ]


def _self_and_ancestors(stats: dict[int, _Stat]) -> set[int]:
    chain: set[int] = set()
    pid = os.getpid()
    while pid not in chain:
        chain.add(pid)
        stat = stats.get(pid)
        if stat is None:
            break
        pid = stat.ppid
    return chain


def _has_variable(pid: int, entry: bytes) -> bool:
    try:
        return entry in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:  # another user's process, or one that has just ended
        return False


def stop_family(
    find: Callable[[], list[ProcessId]],
    *,
    leader: ProcessId | None = None,
    grace_s: float = 0.0,
    settle_s: float = SETTLE_S,
    pause: Callable[[float], object] = time.sleep,
) -> list[ProcessId]:
    """Stop a leader with grace, then everybody that it leaves behind.

    The leader alone gets the first SIGTERM, as PID 1 of a container would: it decides in which order
    its own children end. After ``grace_s`` seconds it gets SIGKILL. When it is gone, the rest of the family
    gets SIGTERM, and whoever is left ``settle_s`` seconds later SIGKILL.

    Args:
        find: who belongs to the family now; asked again and again, since a family can grow.
        pause: waits that many seconds; a caller with children of its own reaps them there.

    Returns:
        Who survived even SIGKILL (uninterruptible I/O); normally nobody.
    """
    if leader is not None and leader.send(signal.SIGTERM):
        _wait(lambda: not leader.alive(), grace_s, pause)
        leader.send(signal.SIGKILL)
    told: set[ProcessId] = {leader} if leader is not None else set()

    def nobody_left_after(signum: signal.Signals, *, repeat: bool) -> bool:
        members = find()
        for member in members:
            if repeat or member not in told:
                told.add(member)
                member.send(signum)
        return not members

    if _wait(lambda: nobody_left_after(signal.SIGTERM, repeat=False), settle_s, pause):
        return []
    _wait(lambda: nobody_left_after(signal.SIGKILL, repeat=True), _KILL_WAIT_S, pause)
    return find()


def _wait(done: Callable[[], bool], timeout_s: float, pause: Callable[[float], object]) -> bool:
    deadline = time.monotonic() + timeout_s
    while not done():
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        pause(min(_POLL_S, left_s))
    return True


def reap() -> dict[int, int]:
    """Collect every child that has ended: process number -> exit code (negative: killed by that signal)."""
    ended: dict[int, int] = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def become_subreaper() -> None:
    """Make orphans among this process's descendants its children, instead of init's.

    Raises:
        OSError: the kernel refuses (not Linux, or older than 3.4).
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(signum: signal.Signals) -> Callable[[], None]:
    """A ``preexec_fn`` that makes the child get ``signum`` when this process dies, however it dies.

    ctypes is loaded here, in the parent: between fork and exec only the system call itself is safe.
    """
    parent = os.getpid()
    call = _prctl_function()

    def in_child() -> None:
        call(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0)
        if os.getppid() != parent:  # it died before the call above
            os._exit(128 + int(signum))

    return in_child


def _prctl_function() -> Callable[..., int]:
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    library.prctl.argtypes = [ctypes.c_int, *([ctypes.c_ulong] * 4)]
    function: Callable[..., int] = library.prctl
    return function


def _prctl(option: int, value: int) -> None:
    import ctypes

    if _prctl_function()(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def describe(processes: Iterable[ProcessId]) -> str:
    """Numbers and names for a log line: ``1234 (raylet), 1240 (python)``."""
    return ", ".join(f"{p.pid} ({_name(p.pid)})" for p in processes)


def _name(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "gone"
