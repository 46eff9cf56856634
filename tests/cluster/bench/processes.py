"""Processes that cannot outlive the bench."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


def start(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A process in a session of its own, which the kernel kills when the calling thread ends."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [str(part) for part in command],
            env=None if environment is None else dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def die_with_parent() -> None:
    """To be called in a child between fork and exec."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """What a child leaves behind becomes this process's own child, which ``kill_carrying`` then reaps."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def stop(process: subprocess.Popen[bytes], grace_s: float = 5.0) -> None:
    """SIGTERM, and SIGKILL to whatever is left of its group after ``grace_s``."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def carrying(variable: str, prefix: str) -> list[int]:
    """The processes that were started with an environment variable whose value begins with ``prefix``.

    A process keeps it through forks and new sessions, so this finds what a process group does not.
    """
    needle = f"{variable}={prefix}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            environment = b"\0" + (folder / "environ").read_bytes()
            if b"\0" + needle in environment:
                found.append(int(folder.name))
    return found


def kill_carrying(variable: str, prefix: str, *, waited_for: Collection[int] = ()) -> None:
    """SIGKILL, again until none is left: one may fork while the others are killed.

    Adopted orphans are reaped; ``waited_for`` are those whose exit code somebody else waits for.
    """
    while pids := carrying(variable, prefix):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        for pid in set(pids).difference(waited_for):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on, below those that the kernel gives to outgoing connections,
    so that a server which is killed finds its port still free when it comes back."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in ports:
                ports.append(port)
    return ports
