"""Who is who among processes, and stopping a family of them; with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.backends.processes import ProcessId, boot_id, describe, family, is_stopped, stop_family
from tests.launcher.local_run import wait_for

SLEEP = "import time; time.sleep(1000)"
GENTLE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(5))
print("ready", flush=True)
time.sleep(1000)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(1000)
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], env={})
print(child.pid, flush=True)
child.wait()
"""
BREEDER = """
import signal, subprocess, sys, time
def again(*_):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    sys.exit(0)
signal.signal(signal.SIGTERM, again)
print("ready", flush=True)
time.sleep(1000)
"""
LEADER = f"""
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {GENTLE!r}], stdout=subprocess.PIPE)
child.stdout.readline()
def end(*_):
    child.send_signal(signal.SIGUSR1)
    print(child.wait(), flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
signal.pause()
"""
ASKER = """
import subprocess, sys
inner = "from launcher.backends.processes import family; print(len(family(('SOME_RUN', '/r/shell'))))"
subprocess.run([sys.executable, "-c", inner], check=True)
"""
REAPER = """
import os, signal
from launcher.backends.processes import reap
assert reap() == {}
pids = []
for ending in (0, 3, None):
    pid = os.fork()
    if pid == 0:
        os._exit(ending) if ending is not None else os.kill(os.getpid(), signal.SIGKILL)
    pids.append(pid)
ended = {}
while len(ended) < 3:
    ended |= reap()
print([ended[pid] for pid in pids])
"""


@contextmanager
def child(code: str = SLEEP, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def known(pid: int) -> ProcessId:
    process = ProcessId.of(pid)
    assert process is not None
    return process


def test_a_reused_number_is_another_process() -> None:
    me = known(os.getpid())
    assert me.alive()
    earlier = ProcessId(me.pid, me.start_token + "0")
    assert not earlier.alive()
    assert not earlier.send(signal.SIGKILL)  # or this test would not get further
    other_boot = ProcessId(me.pid, me.start_token.replace(boot_id(), "00000000-0000-0000-0000-000000000000"))
    assert not other_boot.alive()


def test_a_zombie_is_not_alive() -> None:
    with child("pass") as process:
        before = ProcessId.of(process.pid)
        wait_for(lambda: "\nState:\tZ" in Path(f"/proc/{process.pid}/status").read_text())
        assert ProcessId.of(process.pid) is None
        assert before is None or not before.alive()


def test_names_with_parentheses_and_spaces_do_not_confuse(tmp_path: Path) -> None:
    program = tmp_path / "a) R 1 (b"
    program.symlink_to(sys.executable)
    process = subprocess.Popen([program, "-c", SLEEP])
    try:
        wait_for(lambda: "a) R" in Path(f"/proc/{process.pid}/comm").read_text())
        assert known(process.pid) in family(("NOT_SET_ANYWHERE", "1"), under=os.getpid())
    finally:
        process.kill()
        process.wait()


def test_family_by_marker_and_by_descent_without_oneself() -> None:
    """Also a child whose own environment says nothing, and not the process whose marker only begins alike."""
    with child(PARENT, SOME_RUN="/r/x") as marked, child(SOME_RUN="/r/xy") as other, child() as plain:
        unmarked_grandchild = int(said(marked))
        assert {process.pid for process in family(("SOME_RUN", "/r/x"))} == {marked.pid, unmarked_grandchild}
        under_me = {process.pid for process in family(("NOT_SET_ANYWHERE", "1"), under=os.getpid())}
        assert {marked.pid, unmarked_grandchild, other.pid, plain.pid} <= under_me
        assert os.getpid() not in under_me
        os.kill(unmarked_grandchild, signal.SIGKILL)


def test_who_asks_from_a_shell_with_the_marker_is_no_member() -> None:
    environment = {**os.environ, "SOME_RUN": "/r/shell"}
    done = subprocess.run(
        [sys.executable, "-c", ASKER], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0"


def test_stop_family_is_gentle_first_and_then_not() -> None:
    with child(GENTLE, SOME_RUN="/r/stop") as gentle, child(DEAF, SOME_RUN="/r/stop") as deaf:
        assert said(gentle) == said(deaf) == "ready"
        assert stop_family(lambda: family(("SOME_RUN", "/r/stop")), settle_s=1) == []
        assert gentle.wait() == 7
        assert deaf.wait() == -signal.SIGKILL


def test_stop_family_stops_who_was_born_meanwhile_and_who_was_suspended() -> None:
    with child(BREEDER, SOME_RUN="/r/breed") as breeder, child(SOME_RUN="/r/breed") as suspended:
        assert said(breeder) == "ready"
        os.kill(suspended.pid, signal.SIGSTOP)
        wait_for(lambda: is_stopped(suspended.pid))
        assert stop_family(lambda: family(("SOME_RUN", "/r/breed")), settle_s=0.5) == []
        assert family(("SOME_RUN", "/r/breed")) == []


def test_only_the_leader_is_told_first() -> None:
    """A leader that ends in time ends its own children in its own way."""
    with child(LEADER, SOME_RUN="/r/leader") as leader:
        assert said(leader) == "ready"
        process = known(leader.pid)
        assert stop_family(lambda: family(("SOME_RUN", "/r/leader")), leader=process, grace_s=30) == []
        assert leader.wait() == 75
        assert said(leader) == "5"  # its child ended by its word, not by ours


def test_a_deaf_leader_is_killed_after_its_grace() -> None:
    with child(DEAF, SOME_RUN="/r/deaf") as leader:
        assert said(leader) == "ready"
        mark = ("SOME_RUN", "/r/deaf")
        assert stop_family(lambda: family(mark), leader=known(leader.pid), grace_s=0.5, settle_s=1000) == []
        assert leader.wait() == -signal.SIGKILL


def test_reap_collects_every_child_with_its_code() -> None:
    """In a process of its own, since it takes the children of whoever calls it."""
    done = subprocess.run([sys.executable, "-c", REAPER], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0, 3, -9]"


def test_description_names_processes_dead_and_alive() -> None:
    me = known(os.getpid())
    text = describe([me, ProcessId(2**22 + 1, "x")])
    assert text.startswith(f"{me.pid} (")
    assert text.endswith("(gone)")
