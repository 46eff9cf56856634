"""Who is who among processes, and stopping a family of them; with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.backends.processes import ProcessId, boot_id, describe, family, is_stopped, reap, stop_family
from tests.launcher.local_run import wait_for

SLEEP = "import time; time.sleep(1000)"
DEAF = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); " + SLEEP


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
    grandchild = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], env={});"
        "print(p.pid, flush=True); p.wait()"
    )
    with child(grandchild, SOME_RUN="/r/x") as marked, child(SOME_RUN="/r/xy") as other, child() as plain:
        assert marked.stdout is not None
        unmarked_grandchild = int(marked.stdout.readline())
        found = {process.pid for process in family(("SOME_RUN", "/r/x"))}
        assert found == {marked.pid, unmarked_grandchild}
        under_me = {process.pid for process in family(("NOT_SET_ANYWHERE", "1"), under=os.getpid())}
        assert {marked.pid, unmarked_grandchild, other.pid, plain.pid} <= under_me
        assert os.getpid() not in under_me
        os.kill(unmarked_grandchild, signal.SIGKILL)


def test_a_shell_with_the_marker_that_asks_is_no_member() -> None:
    """The asker and its ancestors are spared, their siblings are not."""
    code = (
        "import subprocess, sys;"
        "inner = 'from launcher.backends.processes import family; print(len(family((\"SOME_RUN\", \"/r/shell\"))))';"
        "subprocess.run([sys.executable, '-c', inner], check=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "SOME_RUN": "/r/shell"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0"


def test_stop_family_is_gentle_first_and_then_not() -> None:
    gentle_code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('ready', flush=True); "
    with child(gentle_code + SLEEP, SOME_RUN="/r/stop") as gentle, child(DEAF, SOME_RUN="/r/stop") as deaf:
        for process in (gentle, deaf):
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        left = stop_family(lambda: family(("SOME_RUN", "/r/stop")), settle_s=3)
        assert left == []
        assert gentle.wait() == 7
        assert deaf.wait() == -signal.SIGKILL


def test_stop_family_stops_who_was_born_meanwhile_and_a_stopped_one() -> None:
    breeder = (
        "import os, signal, subprocess, sys, time\n"
        "def again(*_):\n"
        "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'])\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, again)\n"
        "print('ready', flush=True)\n"
        "time.sleep(1000)\n"
    )
    with child(breeder, SOME_RUN="/r/breed") as process, child(SOME_RUN="/r/breed") as stopped:
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(stopped.pid, signal.SIGSTOP)
        wait_for(lambda: is_stopped(stopped.pid))
        assert stop_family(lambda: family(("SOME_RUN", "/r/breed")), settle_s=2) == []
        assert family(("SOME_RUN", "/r/breed")) == []


def test_only_the_leader_is_told_first() -> None:
    """A leader that ends in time takes its own children with it in its own order."""
    leader_code = (
        "import signal, subprocess, sys\n"
        "kid = subprocess.Popen([sys.executable, '-c', "
        "\"import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); "
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(5)); print('ready', flush=True); time.sleep(1000)\"],"
        " stdout=subprocess.PIPE)\n"
        "kid.stdout.readline()\n"
        "def end(*_):\n"
        "    kid.send_signal(signal.SIGUSR1)\n"
        "    print(kid.wait(), flush=True)\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "print('ready', flush=True)\n"
        "signal.pause()\n"
    )
    with child(leader_code, SOME_RUN="/r/leader") as leader:
        assert leader.stdout is not None
        assert leader.stdout.readline() == "ready\n"
        mark = ("SOME_RUN", "/r/leader")
        assert stop_family(lambda: family(mark), leader=known(leader.pid), grace_s=30) == []
        assert leader.wait() == 75
        assert leader.stdout.readline() == "5\n"  # it ended by its parent's word, not by ours


def test_reap_collects_every_child_with_its_code() -> None:
    """In a process of its own, since it takes the children of whoever calls it."""
    code = (
        "import os, signal, time\n"
        "from launcher.backends.processes import reap\n"
        "assert reap() == {}\n"
        "pids = []\n"
        "for ending in (0, 3, None):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        os._exit(ending) if ending is not None else os.kill(os.getpid(), signal.SIGKILL)\n"
        "    pids.append(pid)\n"
        "ended = {}\n"
        "while len(ended) < 3:\n"
        "    ended |= reap()\n"
        "print([ended[p] for p in pids])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0, 3, -9]"


def test_description_names_processes_dead_and_alive() -> None:
    me = known(os.getpid())
    text = describe([me, ProcessId(2**22 + 1, "x")])
    assert text.startswith(f"{me.pid} (")
    assert text.endswith("(gone)")


def test_reap_has_nothing_to_do_without_children() -> None:
    assert subprocess.run(
        [sys.executable, "-c", "from launcher.backends.processes import reap; raise SystemExit(len(reap()))"], check=True
    ).returncode == 0
    assert callable(reap)
