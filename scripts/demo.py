"""The demo: one run of ``alltoken-timing`` on this machine's CPU, from submit to the results' tables.

Prints each command before it runs it, so that what it does can be repeated by hand. The run's name ends in
the first digits of the spec's hash: a second ``make demo`` finds the finished run and adopts it, a changed
tree makes a new one.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO_DIR = REPOSITORY / ".demo"
PRESET = ["--preset", "alltoken-timing", "--overlay", "tiny-cpu", "--suffix", "hash"]


def launcher(*args: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    """Run one launcher command; echo it and let it print, or with ``quiet`` return what it printed."""
    if not quiet:
        print(f"\n$ launcher {shlex.join(args)}", flush=True)
    return subprocess.run(
        [sys.executable, "-m", "launcher", *args],
        cwd=REPOSITORY,
        env={
            **os.environ,
            "INFL_ROOT": str(DEMO_DIR / "runs"),
            "INFL_RESULTS": str(DEMO_DIR / "results"),
            "INFL_INDEX": str(DEMO_DIR / "index.sqlite"),
        },
        stdout=subprocess.PIPE if quiet else None,
        text=True,
        check=False,
    )


def main() -> int:
    started = time.monotonic()
    plan = launcher("submit", *PRESET, "--dry-run", "--output", "json", quiet=True)
    if plan.returncode:
        print(plan.stdout, end="")
        return plan.returncode
    run = json.loads(plan.stdout)["run"]
    for args in (
        ("submit", *PRESET, "--follow"),
        ("collect", "--run", run),
        ("results", "show", run),
    ):
        code = launcher(*args).returncode
        if code:
            print(f"\nThe demo stopped: that command exited with {code}.", file=sys.stderr)
            print(f"The run's own words: {DEMO_DIR / 'runs' / run / 'logs'}", file=sys.stderr)
            return code
    print(f"\nDone in {time.monotonic() - started:.0f} s. To look further, in this folder:")
    print("  . .venv/bin/activate")
    print("  export INFL_ROOT=.demo/runs INFL_RESULTS=.demo/results INFL_INDEX=.demo/index.sqlite")
    print(f"  launcher logs {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
