"""The parent's care for its child: output, signals, end; with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from influence.config import TracerConfigError
from influence.recording import CaptureError
from influence.rundir import Attempt, FencedError, RunPaths, claim_attempt
from influence.train.attempt_log import AttemptLog
from influence.train.child import _refusal
from influence.train.process import Ending, StopSignals, run_child
from influence.train.refusal import FAILED
from influence.verl_engine.compose import ConfigurationError
from tests.trainer.conftest import Spec


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield StopSignals()
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def run(program: str, signals: StopSignals, write: Callable[[bytes], None], grace_s: float = 30) -> Ending:
    return run_child([sys.executable, "-c", textwrap.dedent(program)], os.environ, write, signals, grace_s)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def send_when(seen: bytearray, word: bytes, number: signal.Signals) -> None:
    """A signal to ourselves as soon as the child has said a word."""

    def watch() -> None:
        while word not in seen:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


def test_both_streams_reach_the_writer_whole(signals: StopSignals) -> None:
    seen = bytearray()
    program = """
        import sys
        sys.stdout.write("x" * 300_000 + "\\n"); sys.stdout.flush()
        sys.stderr.write("to stderr\\n")
    """
    assert run(program, signals, seen.extend) == Ending(0, None, "")
    assert bytes(seen) == b"x" * 300_000 + b"\nto stderr\n"


@pytest.mark.parametrize("code", [0, 3, 75, 78])
def test_exit_codes_pass_through(signals: StopSignals, code: int) -> None:
    assert run(f"raise SystemExit({code})", signals, bytearray().extend) == Ending(code, None, "")


def test_death_by_a_signal_is_128_plus_its_number(signals: StopSignals) -> None:
    ending = run("import os; os.kill(os.getpid(), 9)", signals, bytearray().extend)
    assert ending == Ending(137, None, "")


def test_the_child_can_say_why(signals: StopSignals) -> None:
    program = """
        import os, sys
        os.write(int(sys.argv[sys.argv.index("--reason-fd") + 1]), "zu wenig Speicher äöü".encode())
    """
    assert run(program, signals, bytearray().extend).last_words == "zu wenig Speicher äöü"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_the_child_end_in_its_own_way(signals: StopSignals, number: signal.Signals) -> None:
    seen = bytearray()
    send_when(seen, b"ready", number)
    program = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (print("tidied", flush=True), sys.exit(7)))
        print("ready", flush=True)
        time.sleep(60)
    """
    assert run(program, signals, seen.extend) == Ending(7, number, "")
    assert b"tidied" in seen


def test_a_child_that_ignores_sigterm_is_killed_with_its_group(signals: StopSignals) -> None:
    seen = bytearray()
    send_when(seen, b"\n", signal.SIGTERM)
    program = """
        import signal, subprocess, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
        time.sleep(60)
    """
    assert run(program, signals, seen.extend, grace_s=0.3) == Ending(137, signal.SIGTERM, "")
    wait_until(lambda: not is_alive(int(seen)))


def test_a_stop_before_the_start_is_not_lost(signals: StopSignals) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    seen = bytearray()
    ending = run("import time; time.sleep(60); print('never')", signals, seen.extend)
    assert ending == Ending(143, signal.SIGTERM, "")
    assert not seen


def test_a_grandchild_that_holds_the_output_open_does_not_hold_us(signals: StopSignals) -> None:
    seen = bytearray()
    program = """
        import subprocess
        print(subprocess.Popen(["sleep", "60"], start_new_session=True).pid, flush=True)
    """
    assert run(program, signals, seen.extend).exit_code == 0
    assert is_alive(int(seen))  # it has left the group
    os.kill(int(seen), signal.SIGKILL)


SUBREAPER = """
import subprocess, sys
from influence.train.process import become_subreaper, end_descendants
become_subreaper()
print(subprocess.run([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE).stdout.decode().strip())
print(end_descendants(), flush=True)
"""
DAEMON = """
import subprocess
nowhere = subprocess.DEVNULL
sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True, stdout=nowhere, stderr=nowhere)
print(sleeper.pid)
"""


def test_orphans_in_sessions_of_their_own_are_found_and_ended() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUBREAPER, DAEMON], capture_output=True, text=True, check=True
    )
    pid, num_left = done.stdout.split()
    assert num_left == "0"
    assert not is_alive(int(pid))


ORPHANED = """
import sys
from influence.train.process import StopSignals, run_child
program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
write = lambda data: (sys.stdout.buffer.write(data), sys.stdout.flush())
run_child([sys.executable, "-c", program], {}, write, StopSignals(), 30)
"""


def test_the_child_dies_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHANED], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_alive(child))
    parent.stdout.close()


def test_a_log_on_a_full_disk_is_said_once_and_goes_on_elsewhere(capfd: pytest.CaptureFixture[str]) -> None:
    log = AttemptLog(Path("/dev/full"))  # opening it works, every write gives ENOSPC
    log.line("first")
    log.line("second")
    log.close()
    out = capfd.readouterr().out
    assert out.count("No space left on device") == 1
    assert out.count("first") == out.count("second") == 1


def test_a_log_that_cannot_be_opened_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("a file where the directory should be")
    log = AttemptLog(tmp_path / "logs" / "attempt-0001.log")
    log.line("work")
    log.close()
    assert capfd.readouterr().out.count("\n") == 2


def test_the_console_gets_everything_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A pipe that another process reads, as a container's first process has it."""
    reader, writer = os.pipe()
    log = AttemptLog(tmp_path / "attempt-0001.log", f"/proc/self/fd/{writer}")
    os.close(writer)
    log.line("first")
    log.close()
    assert os.read(reader, 100) == b"first\n"
    assert os.read(reader, 100) == b"", "closed, or its reader would wait for ever"
    os.close(reader)
    assert capfd.readouterr().out == (tmp_path / "attempt-0001.log").read_text() == "first\n"


@pytest.mark.parametrize("console", ["/no/such/console", "/dev/full"])
def test_a_console_that_fails_stops_nothing(
    console: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = AttemptLog(tmp_path / "attempt-0001.log", console)
    log.line("first")
    log.line("second")
    log.close()
    assert capfd.readouterr().out == (tmp_path / "attempt-0001.log").read_text() == "first\nsecond\n"


@pytest.fixture
def attempt(make_run: Callable[..., RunPaths], tiny_spec: Spec) -> Attempt:
    return claim_attempt(make_run(tiny_spec))


def test_what_an_actor_raised_is_found_through_rays_wrappers(attempt: Attempt) -> None:
    ray_exceptions = pytest.importorskip("ray.exceptions")

    def wrapped(error: Exception) -> Exception:
        # As ray.get raises it: a wrapper that is also of the wrapped type, with a traceback as its text.
        return ray_exceptions.RayTaskError(
            "update_actor", "Traceback\n  File ...", error
        ).as_instanceof_cause()

    fenced = _refusal(wrapped(wrapped(FencedError("attempts/0002.json", 1, 2))), attempt)
    assert fenced.code == 75
    assert fenced.reason.startswith("attempts/0002.json: attempt 1 is fenced")
    for error in (
        TracerConfigError("influence.modules: 'nope' matches no layer"),
        CaptureError("influence.capture: fused is not exact in this micro-batch"),
        ConfigurationError("model.use_liger bypasses the traced layers"),
    ):
        refused = _refusal(wrapped(wrapped(error)), attempt)
        assert (refused.code, refused.reason) == (78, str(error)), "no retry would end otherwise"
    broken = _refusal(wrapped(wrapped(RuntimeError("no such\ndevice"))), attempt)
    assert (broken.code, broken.reason) == (FAILED, "RuntimeError: no such device")


def test_any_failure_of_a_fenced_attempt_is_a_free_retry(
    make_run: Callable[..., RunPaths], tiny_spec: Spec
) -> None:
    paths = make_run(tiny_spec)
    first = claim_attempt(paths)
    claim_attempt(paths)
    assert _refusal(RuntimeError("connection lost"), first).code == 75
