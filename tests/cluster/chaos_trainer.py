"""A trainer for runs that everything happens to: commits the missing steps one by one, each a random while.

    python chaos_trainer.py WITNESS RUN_DIR    (an image's ``python -m influence.train`` becomes this)

It holds a lock in WITNESS as long as it lives, and adds a line to ``overlaps`` there where it finds another
holding it: two pods of one run at once. One attempt in eight fails by itself, and is charged.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from influence.rundir import FencedError, RunPaths, RunSpec, claim_attempt, create_run, missing_steps


def main() -> int:
    witness, run_dir = Path(sys.argv[1]), Path(sys.argv[2])
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    lock = os.open(witness / run_dir.name, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with (witness / "overlaps").open("a") as file:
            file.write(f"{run_dir.name}: {os.environ.get('POD_NAME')}\n")
    paths, run = RunPaths.at(run_dir), RunSpec.from_dict(json.loads(os.environ["INFL_RUN_JSON"]))
    create_run(paths, run)
    missing = missing_steps(paths, run.spec["training"]["total_steps"])
    if not missing:
        return 0

    from influence.rundir import StepWriter
    from tests.launcher.fake_trainer import arrays

    attempt = claim_attempt(paths, pod=os.environ.get("POD_NAME"))
    attempt.set_resume(missing[0] - 1)
    writer = StepWriter(paths, attempt.number, run.spec_hash, store={})
    code, why = 0, "all steps committed"
    for step in missing:
        end = time.monotonic() + random.uniform(0.2, 3)
        while time.monotonic() < end and not told:
            time.sleep(0.05)
        if told:
            code, why = 75, "SIGTERM"
            break
        if random.random() < 0.04:
            code, why = 3, "by chance"
            break
        try:
            writer.commit(step, arrays(step), timings={}, metrics={})
        except FencedError:
            code, why = 75, "fenced"
            break
    attempt.finish(code, why)
    return code


if __name__ == "__main__":
    sys.exit(main())
