"""The parent process of an attempt: from the command line to the exit code. Standard library only."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from influence.rundir import (
    Attempt,
    RunDirError,
    RunPaths,
    RunSpec,
    TrainerExit,
    claim_attempt,
    create_run,
    describe,
    missing_steps,
    read_run,
)
from influence.train.refusal import FAILED, Refusal, refusal_of

if TYPE_CHECKING:
    from influence.train.attempt_log import AttemptLog
    from influence.train.process import StopSignals
    from influence.train.stored import StoredRun

URL_VARIABLE = "INFL_STORE_URL"
"""Environment variable with the object store that is the home of the runs: ``s3://bucket/influence``."""

RUN_JSON = "INFL_RUN_JSON"
"""Environment variable with the content of run.json, for a directory that has none yet."""


def main(argv: Sequence[str] | None = None) -> int:
    """Make one attempt at a run.

    Returns:
        An exit code of `influence.rundir.TrainerExit`, 1 after any other failure, 128 + n where signal n
        killed the child.
    """
    try:
        args = _parser().parse_args(argv)
        paths = RunPaths.at(args.run_dir)
        store = _open_store(paths)
        if store:
            store.fetch()
        run = _read_or_create(paths)
        total_steps = _total_steps(run)
        missing = missing_steps(paths, total_steps)
        if not missing:
            _say(f"{paths.name}: all {total_steps} steps are committed, nothing to do", sys.stdout)
            return TrainerExit.OK
        if store:
            store.publish_run(run)
        return _attempt(paths, run, missing, store)
    except RunDirError as error:
        return _say_no(refusal_of(error))
    except Refusal as refusal:
        return _say_no(refusal)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refusal(
            TrainerExit.USAGE, f"{message}; usage: {self.format_usage().removeprefix('usage: ').strip()}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m influence.train", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True, help="the run: a directory with run.json")
    return parser


def _read_or_create(paths: RunPaths) -> RunSpec:
    """The run's spec; written first where the environment brings one and the directory has none.

    Raises:
        RunDirError, Refusal: there is no spec, or another one.
    """
    text = os.environ.get(RUN_JSON)
    if text:
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Refusal(TrainerExit.USAGE, f"{RUN_JSON} is not valid JSON ({error})") from None
        run = RunSpec.from_dict(document)
        if run.run != paths.name:
            raise Refusal(
                TrainerExit.USAGE, f"{RUN_JSON} is of the run {run.run!r}, --run-dir of {paths.name!r}"
            )
        create_run(paths, run)
    return read_run(paths)


def _open_store(paths: RunPaths) -> StoredRun | None:
    """The run's home where that is an object store; None: the run directory is all there is."""
    url = os.environ.get(URL_VARIABLE)
    if not url:
        return None
    from influence.train.stored import StoredRun

    return StoredRun(url, paths)


def _total_steps(run: RunSpec) -> int:
    total_steps = run.spec.get("training", {}).get("total_steps")
    if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
        raise Refusal(
            TrainerExit.CONFIG, f"run.json: training.total_steps is {total_steps!r}; a number of at least 1"
        )
    return total_steps


def _attempt(paths: RunPaths, run: RunSpec, missing: list[int], store: StoredRun | None) -> int:
    # Imported here: a finished run needs none of it.
    from influence.train.attempt_log import CONSOLE, AttemptLog
    from influence.train.process import StopSignals, become_subreaper
    from influence.train.version import installed_version

    signals = StopSignals()
    become_subreaper()
    attempt = claim_attempt(
        paths,
        reserve=store.reserve if store else None,
        node=os.environ.get("NODE_NAME"),
        pod=os.environ.get("POD_NAME"),
        package_version=installed_version(),
    )
    log = AttemptLog(paths.log(attempt.number), os.environ.get(CONSOLE))
    try:
        log.line(
            f"influence.train: {paths.name}, attempt {attempt.number}: "
            f"{len(missing)} steps to go, from step {missing[0]}"
        )
        try:
            code, reason = _run(paths, run, attempt, log, signals, store)
        except RunDirError as error:
            refusal = refusal_of(error)
            code, reason = refusal.code, refusal.reason
        except Refusal as refusal:
            code, reason = refusal.code, refusal.reason
        if store:
            code, reason = store.settle(code, reason, signals, _grace_s(run))
        log.line(f"influence.train: {reason}")
    finally:
        log.close()
    _record_end(attempt, code, reason)
    if store and not store.send_end(attempt, signals, _grace_s(run)):
        _say("influence.train: the store did not take the attempt's end and log", sys.stderr)
    return code


def _run(
    paths: RunPaths,
    run: RunSpec,
    attempt: Attempt,
    log: AttemptLog,
    signals: StopSignals,
    store: StoredRun | None,
) -> tuple[int, str]:
    """Check, run the child, and say how it went: exit code and reason.

    Raises:
        RunDirError, Refusal: it cannot be run.
    """
    from influence.machine import this_machine
    from influence.train.preflight import preflight
    from influence.train.process import end_descendants, run_child
    from influence.train.schema import require_valid_spec
    from influence.verl_engine.checkpoints import newest_checkpoint

    require_valid_spec(run.spec)
    preflight(run.spec, this_machine())
    if store:
        if not store.take_over(
            attempt, _total_steps(run), signals, lambda line: log.line(f"influence.train: {line}")
        ):
            return TrainerExit.OK, describe(TrainerExit.OK)
        store.start(
            attempt,
            lambda: newest_checkpoint(paths.checkpoints_dir),
            run.spec["training"]["keep_checkpoints"],
            signals,
        )
    ending = run_child(
        [*_child_command(paths), "--attempt", str(attempt.number)],
        child_environment(run, paths, attempt.number),
        log.write,
        signals,
        grace_s=_child_grace_s(run, store),
    )
    if num_left := end_descendants():
        log.line(f"influence.train: {num_left} processes would not end")
    if store and (trouble := store.trouble()):
        return trouble.code, trouble.reason
    if ending.stop_signal is not None:
        return TrainerExit.RETRY, f"stopped by {ending.stop_signal.name}"
    if ending.exit_code == TrainerExit.OK and (missing := missing_steps(paths, _total_steps(run))):
        return FAILED, f"verl ended, but these steps are not committed: {missing}"
    return ending.exit_code, ending.last_words or describe(ending.exit_code)


def _child_command(paths: RunPaths) -> list[str]:
    return [sys.executable, "-m", "influence.train.child", "--run-dir", str(paths.root_dir)]


def child_environment(run: RunSpec, paths: RunPaths, number: int) -> dict[str, str]:
    from influence.tiny.cache import cache_root
    from influence.verl_engine.environment import (
        bytecode_environment,
        ray_environment,
        worker_environment,
    )

    return {
        **os.environ,
        "PYTHONUNBUFFERED": "1",  # or a killed child's last lines are lost
        **ray_environment(),
        **bytecode_environment(os.environ, cache_root()),
        **worker_environment(run, paths, number),
    }


def _grace_s(run: RunSpec) -> float:
    """What we get ourselves, from SIGTERM to SIGKILL."""
    return float(run.spec.get("retry", {}).get("grace_period_s", 30))


def _child_grace_s(run: RunSpec, store: StoredRun | None) -> float:
    """Less than we get ourselves, so that there is time left to record the end, and to send what is left."""
    grace_s = _grace_s(run)
    return 0.5 * grace_s if store else max(0.5 * grace_s, grace_s - 5.0)


def _record_end(attempt: Attempt, code: int, reason: str) -> None:
    """The attempt's own record; a full disk must not change what we exit with."""
    try:
        attempt.finish(code, reason)
    except RunDirError as error:
        _say(f"influence.train: the end could not be recorded: {error}", sys.stderr)


def _say_no(refusal: Refusal) -> int:
    _say(f"influence.train: {refusal.reason}", sys.stderr)
    return refusal.code


def _say(line: str, stream: TextIO | None) -> None:
    """A line for whoever listens: a full disk or a closed stream must not change what we exit with."""
    if stream is None:  # closed before we began
        return
    # Past the stream's buffer, which Python flushes at the end, and exits with 120 where it cannot.
    with suppress(OSError, ValueError):
        os.write(stream.fileno(), f"{line}\n".encode(errors="backslashreplace"))
