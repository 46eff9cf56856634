"""The trainer's child without verl: commits steps, saves checkpoints, logs metrics, in verl's order.

Before each step it reads ``orders.json`` in the directory that FAKE_ORDERS names: ``{"2": "wait"}`` makes it
wait before step 2 until the file ``go`` is there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from influence.rundir import Attempt, RunDirError, RunPaths, StepWriter, missing_steps, read_run
from influence.train.refusal import refusal_of
from influence.verl_engine.checkpoints import begin_checkpoint, checkpoint_attempt, settle_tracker
from tests.launcher.fake_trainer import arrays


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--attempt", type=int)
    parser.add_argument("--reason-fd", type=int)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    try:
        train(RunPaths.at(args.run_dir), args.attempt)
    except RunDirError as error:
        refusal = refusal_of(error)
        os.write(args.reason_fd, refusal.reason.encode())
        return refusal.code
    return 0


def train(paths: RunPaths, number: int) -> None:
    run, attempt = read_run(paths), Attempt(paths, number)
    total_steps = run.spec["training"]["total_steps"]
    resume_from = settle_tracker(paths.checkpoints_dir, missing_steps(paths, total_steps)[0])
    print(f"child resumes from {resume_from}", flush=True)
    if resume_from:
        attempt.set_resume(resume_from, checkpoint_attempt(paths.checkpoints_dir, resume_from))
    writer = StepWriter(paths, number, run.spec_hash, store=run.spec["store"])
    for step in range(resume_from + 1, total_steps + 1):
        obey(step)
        writer.commit(step, arrays(step), timings={}, metrics={})
        with paths.metrics(number).open("a") as stream:
            stream.write(json.dumps({"step": step, "data": {"loss": step}}) + "\n")
        begin_checkpoint(paths.checkpoints_dir, step, number)
        folder = paths.checkpoints_dir / f"global_step_{step}"
        (folder / "actor").mkdir()
        (folder / "actor" / "model.pt").write_bytes(b"weights %d" % step)
        (folder / "data.pt").write_bytes(b"data")
        (paths.checkpoints_dir / "latest_checkpointed_iteration.txt").write_text(str(step))
        print(f"child did step {step}", flush=True)


def obey(step: int) -> None:
    if not (place := os.environ.get("FAKE_ORDERS")):
        return
    folder = Path(place)
    if json.loads((folder / "orders.json").read_text()).get(str(step)) == "wait":
        (folder / "waiting").touch()
        while not (folder / "go").exists():
            time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
