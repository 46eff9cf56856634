"""The supervisor of one run on this machine: ``python -m launcher.backends.supervisor --run-dir DIR``.

It runs attempts one after the other until the run is complete, has failed, or is told to stop, and
leaves no process behind. It belongs to no terminal and no launcher: it has a session of its own, and
its output goes to ``local/supervisor.log``.

* One a run: it holds ``flock`` on ``local/`` as long as it lives.
* SIGTERM with a request in ``local/cancel`` or ``local/suspend`` cancels or suspends the run; SIGTERM without
  one (a shutdown) stops it so that a later submit goes on. All give the attempt ``grace_period_s`` and then
  SIGKILL its family.
* When it is killed itself, the kernel sends the attempt SIGTERM; whatever that leaves is swept by the next
  supervisor before it starts an attempt, or by ``launcher cancel``.
* Every supervisor starts with a fresh budget of retries and a fresh deadline, since a person asked for it;
  with ``--resume`` the budget is what the last one left.

Further arguments after ``--run-dir DIR`` replace the trainer's command (to run attempts in a wrapper or
to supervise another program that honours the run directory).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from influence.rundir import RunDirError, RunPaths, read_run
from launcher.backends import journal
from launcher.backends.attempt import trainer_command
from launcher.backends.journal import Outcome, Wish
from launcher.backends.processes import become_subreaper
from launcher.backends.retry import RetryPolicy
from launcher.backends.supervision import SignalWaiter, Supervisor, log

# How long a new supervisor waits for a lock whose holder is not a supervisor.
_LOCK_WAIT_S = 30.0
_LOCK_POLL_S = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise one run; exit 0 when it succeeded or somebody else supervises it, 1 otherwise."""
    args = _parser().parse_args(argv)
    if args.ready_fd is not None and os.fork() > 0:
        os._exit(0)  # the second fork of two: nobody's child, and never a terminal's leader
    tell = _Teller(args.ready_fd)
    try:
        paths = RunPaths.at(args.run_dir)
        spec = read_run(paths).spec  # before the lock, which would make a directory
        with _run_lock(paths) as free:
            if not free:
                tell("taken")
                return 0
            for wish in Wish:
                if (request := getattr(args, f"withdraw_{wish}")) is not None:
                    journal.withdraw(paths, wish, request)
            become_subreaper()
            supervisor = Supervisor(
                paths,
                RetryPolicy.from_spec(spec),
                total_steps=int(spec["training"]["total_steps"]),
                command=args.command or trainer_command(sys.executable, paths.root_dir),
                environment=os.environ,
                signals=SignalWaiter(),
                resume=args.resume,
            )
            supervisor.announce()
            tell("ready")
            return 0 if supervisor.run() is Outcome.SUCCEEDED else 1
    except (RunDirError, OSError) as error:
        log(str(error))
        tell(f"error: {error}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launcher.backends.supervisor", allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True, help="the run to supervise")
    for wish in Wish:
        parser.add_argument(
            f"--withdraw-{wish}", metavar="ID", help=f"go on although this request to {wish} stands"
        )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the retries that the last supervisor left"
    )
    parser.add_argument(
        "--ready-fd", type=int, help="detach, and report on this descriptor: ready, taken or error"
    )
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="what an attempt executes (influence.train)"
    )
    return parser


@contextmanager
def _run_lock(paths: RunPaths) -> Iterator[bool]:
    """The lock; when its holder is not a live supervisor (a `cancel` at work), wait for it a while."""
    give_up_at = time.monotonic() + _LOCK_WAIT_S
    while True:
        with journal.run_lock(paths) as free:
            record = None if free else journal.read_supervisor(paths)
            if free or (record is not None and record.alive()) or time.monotonic() >= give_up_at:
                yield free
                return
        time.sleep(_LOCK_POLL_S)


class _Teller:
    """Answers the launcher that waits for this supervisor, once."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def __call__(self, message: str) -> None:
        if self._descriptor is None:
            return
        with suppress(OSError):  # the launcher may be gone; the run goes on
            os.write(self._descriptor, message.encode("utf-8", "replace"))
        os.close(self._descriptor)
        self._descriptor = None


if __name__ == "__main__":
    sys.exit(main())
