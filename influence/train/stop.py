"""``python -m influence.train.stop --run-dir DIR``: ask the trainer in this container to stop, and wait.

For places where the trainer is not the container's first process, so that no signal reaches it: below Ray's
job server. A pod runs it before it stops its containers. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_POLL_S = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """SIGTERM to each trainer of the run; returns when they have ended, 0 also where there are none.

    There is no time-out: whoever calls has one, and kills what is left.
    """
    parser = argparse.ArgumentParser(prog="python -m influence.train.stop", allow_abbrev=False)
    parser.add_argument("--run-dir", required=True, help="as the trainer was given it")
    run_dir = parser.parse_args(argv).run_dir
    trainers = _trainers(run_dir)
    for pid in trainers:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGTERM)
    while trainers & _trainers(run_dir):
        time.sleep(_POLL_S)
    return 0


def _trainers(run_dir: str) -> set[int]:
    """The processes ``python -m influence.train --run-dir DIR``; they stop their children themselves."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has just ended
        if arguments[1:5] == [b"-m", b"influence.train", b"--run-dir", os.fsencode(run_dir)]:
            found.add(int(entry.name))
    return found


if __name__ == "__main__":
    sys.exit(main())
