"""CPU time (user + system) of the launcher's frequent commands, beside an empty interpreter and click.

    python benchmarks/cli_startup.py [--runs 5] [--output results.json]

Each command runs in a process of its own, once to warm the file cache and then ``--runs`` times; the table
has the median. `status` reads a run directory that the benchmark makes (one run, two committed steps).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from influence.rundir import RunPaths, RunSpec, StepArrays, StepWriter, claim_attempt, create_run

RUN = "infl-benchmark-0101"


def cpu_s(command: list[str], env: dict[str, str]) -> float:
    """User plus system seconds of one child process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)


def make_run(root: Path) -> None:
    """A finished run of two steps."""
    spec = {
        "preset": "benchmark",
        "overlays": [],
        "training": {"total_steps": 2},
        "retry": {"backoff_limit": 4},
    }
    paths = RunPaths.of(root, RUN)
    run = RunSpec.new(RUN, spec, wandb={"mode": "disabled", "url": None})
    create_run(paths, run)
    attempt = claim_attempt(paths)
    attempt.set_resume(0)
    writer = StepWriter(paths, attempt.number, run.spec_hash, store={})
    num_rows = 4
    for step in (1, 2):
        arrays = StepArrays(
            row_offsets=np.arange(num_rows + 1) * 10,
            scores=np.zeros(num_rows * 10, np.float32),
            row_id=np.arange(num_rows),
            prompt_index=np.zeros(num_rows, np.int64),
            session_id=np.arange(num_rows),
            uid=["u"] * num_rows,
            reward=np.zeros(num_rows, np.float32),
            accepted=np.zeros(num_rows, bool),
            scored=np.zeros(num_rows, bool),
            group_id=np.zeros(num_rows, np.int64),
            response_length=np.full(num_rows, 10),
            tracer_config={},
        )
        writer.commit(step, arrays, timings={"pop_rows": 0.1}, metrics={})
    attempt.finish(0, "all steps committed (0)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the numbers as JSON, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder))
        env = {**os.environ, "INFL_ROOT": folder}
        commands = {
            "python -c pass": ["-c", "pass"],
            "python -c 'import click'": ["-c", "import click"],
            "launcher --help": ["-m", "launcher", "--help"],
            "launcher presets list": ["-m", "launcher", "presets", "list"],
            f"launcher status {RUN}": ["-m", "launcher", "status", RUN],
        }
        medians = {}
        for name, words in commands.items():
            command = [sys.executable, *words]
            cpu_s(command, env)
            medians[name] = statistics.median(cpu_s(command, env) for _ in range(args.runs))
    floor = medians["python -c pass"]
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    print(f"{machine}, {datetime.now(UTC):%Y-%m-%d}, median of {args.runs}\n")
    print(f"| {'command':<37} | CPU ms | x empty interpreter |")
    print(f"|{'-' * 39}|-------:|--------------------:|")
    for name, seconds in medians.items():
        print(f"| {f'`{name}`':<37} | {seconds * 1e3:6.0f} | {seconds / floor:19.1f} |")
    if args.output:
        args.output.write_text(json.dumps({"cpu_s": medians, "num_runs": args.runs}, indent=2))


if __name__ == "__main__":
    main()
