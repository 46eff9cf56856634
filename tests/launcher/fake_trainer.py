"""A small program that honours the run directory as the trainer does, and then does what it is told.

    python fake_trainer.py ORDERS RUN_DIR

``ORDERS`` is a JSON file: a list with one entry a start of this program (the last one serves for all later
starts). An entry is a list of orders, carried out in turn:

    "commit N"      commit step N (tiny arrays, through ``influence.rundir``)
    "exit C"        say how the attempt ended, and exit with C
    "raw-exit C"    exit with C without claiming an attempt first
    "kill"          die of SIGKILL
    "hang"          wait for SIGTERM, then exit 75
    "deaf"          ignore SIGTERM and wait for ever
    "orphan"        leave a daemon behind: its own session, its parent gone
    "bare-orphan"   the same with an empty environment
    "deaf-orphan"   the same, ignoring SIGTERM
    "say TEXT"      print to the attempt's log
    "wait FILE"     until the file is there

Each start adds its process number to ``starts`` beside ORDERS, each orphan to ``orphans``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from influence.rundir import RunPaths, claim_attempt, missing_steps, read_run

if TYPE_CHECKING:
    from influence.rundir import StepArrays


def main() -> int:
    orders_file, run_dir = Path(sys.argv[1]), Path(sys.argv[2])
    paths = RunPaths.at(run_dir)
    run = read_run(paths)
    if not missing_steps(paths, run.spec["training"]["total_steps"]):
        return 0
    starts = orders_file.with_name("starts")
    number_of_start = len(starts.read_text().split()) if starts.exists() else 0
    with starts.open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    schedule = json.loads(orders_file.read_text())
    orders = schedule[min(number_of_start, len(schedule) - 1)]
    if orders[0].startswith("raw-exit"):
        return int(orders[0].split()[1])
    attempt = claim_attempt(paths, pod=os.environ.get("POD_NAME"))
    attempt.set_resume(max(paths.committed_step_numbers(), default=0))  # as if from that step's checkpoint
    log = paths.log(attempt.number).open("a", buffering=1)

    def say(text: str) -> None:
        """Into the log, and to whoever started this, as the trainer's parent does."""
        log.write(f"{text}\n")
        print(text, flush=True)

    say(f"attempt {attempt.number} begins")
    for order in orders:
        word, _, rest = order.partition(" ")
        say(order)
        if word == "commit":
            from influence.rundir import StepWriter  # numpy takes a while, and most orders need none

            writer = StepWriter(paths, attempt.number, run.spec_hash, store={})
            writer.commit(int(rest), arrays(int(rest)), timings={}, metrics={})
        elif word == "exit":
            attempt.finish(int(rest), "ordered")
            return int(rest)
        elif word == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "wait":
            while not Path(rest).exists():
                time.sleep(0.05)
        elif word in ("hang", "deaf"):
            wait_for_sigterm(deaf=word == "deaf")
            attempt.finish(75, "SIGTERM")
            return 75
        elif word.endswith("orphan"):
            leave_orphan(
                orders_file.with_name("orphans"), bare=word.startswith("bare"), deaf=word.startswith("deaf")
            )
    return 0


def wait_for_sigterm(*, deaf: bool) -> None:
    told: list[int] = []
    signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else lambda *_: told.append(1))
    while not told:
        time.sleep(0.05)


def leave_orphan(register: Path, *, bare: bool, deaf: bool) -> None:
    """Fork twice with a new session in between, as daemons do, and wait until it is on record."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            if deaf:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with register.open("a") as stream:
                stream.write(f"{os.getpid()}\n")
            os.write(writer, b"!")
            os.close(writer)
            sleeper = [sys.executable, "-c", "import time; time.sleep(1000)"]
            os.execve(sys.executable, sleeper, {} if bare else dict(os.environ))  # noqa: S606
        os._exit(0)
    os.wait()
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)


def arrays(step: int) -> StepArrays:
    import numpy as np

    from influence.rundir import StepArrays

    rows = np.arange(2)
    return StepArrays(
        row_offsets=np.array([0, 2, 3]), scores=np.array([step, 1, 2], np.float32), row_id=rows,
        prompt_index=np.zeros(2, np.int64), session_id=rows, group_id=np.zeros(2, np.int64), uid=["u", "u"],
        reward=np.array([1, 0], np.float32), accepted=np.array([True, False]), scored=np.array([True, True]),
        response_length=np.array([2, 1]),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
