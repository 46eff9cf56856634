"""The child process of an attempt: from the spec to a running verl. This is where torch is imported."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from influence.rundir import (
    Attempt,
    RunDirError,
    RunPaths,
    RunSpec,
    TrainerExit,
    missing_steps,
    read_run,
)
from influence.train.refusal import FAILED, Refusal, refusal_of


class _Stopped(BaseException):
    """SIGTERM: unwind, so that Ray is shut down; no handler on the way should take it for an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train the steps that are missing; the reason of a failure goes to ``--reason-fd``."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    paths = RunPaths.at(args.run_dir)
    attempt = Attempt(paths, args.attempt)
    code, reason = int(TrainerExit.OK), ""
    try:
        _train(paths, read_run(paths), attempt, args.reason_fd)
    except _Stopped:
        code, reason = TrainerExit.RETRY, "stopped by SIGTERM"
    except Exception as error:
        refusal = _refusal(error, attempt)
        if refusal.code == FAILED:
            traceback.print_exc()
        code, reason = refusal.code, refusal.reason
    _give_reason(args.reason_fd, reason)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m influence.train.child", allow_abbrev=False)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--reason-fd", type=int, required=True)
    return parser


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Stopped


def _train(paths: RunPaths, run: RunSpec, attempt: Attempt, reason_fd: int) -> None:
    from influence.verl_engine.checkpoints import settle_tracker

    first_missing = missing_steps(paths, run.spec["training"]["total_steps"])[0]
    resume_from = settle_tracker(paths.checkpoints_dir, first_missing)
    _say(f"resuming from the checkpoint of step {resume_from}" if resume_from else "starting from scratch")
    address, node_ids = _cluster(paths, run, attempt)
    config = verl_config(paths, run, attempt.number, address)

    import ray
    from verl.trainer.main_ppo import run_ppo

    from influence.verl_engine.task_runner import InfluenceTaskRunner
    from influence.verl_engine.watchdog import Watchdog

    watchdog = Watchdog(lambda death: _end_at_once(death, attempt, reason_fd), node_ids=node_ids)
    try:
        with watchdog:
            run_ppo(config, InfluenceTaskRunner)
    except Exception as error:
        lost = watchdog.lost_node()
        if lost is not None and _refusal(error, attempt).code == FAILED:
            raise Refusal(FAILED, lost) from error
        raise
    finally:
        ray.shutdown()


def _end_at_once(death: str, attempt: Attempt, reason_fd: int) -> NoReturn:
    """End this process, whose main thread waits for what never comes; the parent ends those below it."""
    refusal = _unless_fenced(attempt, Refusal(FAILED, death))
    _give_reason(reason_fd, refusal.reason)
    os._exit(refusal.code)


def _cluster(paths: RunPaths, run: RunSpec, attempt: Attempt) -> tuple[str | None, frozenset[str]]:
    """The Ray cluster that a run on several nodes joins, checked, and its nodes' ids.

    None and none for a run on one node, which starts a Ray of its own.

    Raises:
        Refusal: the cluster is not there, or not fit for the run.
    """
    if run.spec["hardware"]["nodes"] == 1:
        return None, frozenset()
    from influence.train.ray_cluster import ray_address, require_cluster

    address = ray_address()
    return address, require_cluster(run.spec, paths, attempt, address, _say)


def verl_config(paths: RunPaths, run: RunSpec, attempt: int, ray_address: str | None) -> Any:
    """verl's configuration, checked.

    Raises:
        Refusal: it cannot work.
    """
    from transformers import AutoConfig
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config
    from verl.utils.device import auto_set_device

    from influence.train.inputs import prepare_inputs
    from influence.verl_engine.compose import (
        ConfigurationError,
        compose_config,
        require_dense,
        require_joinable,
        require_supported,
        require_unowned,
    )
    from influence.verl_engine.environment import worker_environment
    from influence.verl_engine.overrides import verl_overrides

    inputs = prepare_inputs(run.spec, None if ray_address is None else paths.inputs_dir)
    overrides = verl_overrides(
        run.spec,
        paths,
        inputs,
        worker_environment(run, paths, attempt),
        with_wandb=_with_wandb(run),
        num_cpus=len(os.sched_getaffinity(0)),
        ray_address=ray_address,
    )
    try:
        require_unowned(run.spec["verl"])
        config = compose_config(overrides)
        require_supported(config)
        if ray_address is not None:
            require_joinable(config)
        require_dense(AutoConfig.from_pretrained(inputs.model_path))
        auto_set_device(config)
        validate_config(
            config=config,
            use_reference_policy=need_reference_policy(config),
            use_critic=need_critic(config),
        )
    except ConfigurationError as error:
        raise Refusal(TrainerExit.CONFIG, str(error)) from None
    except (AssertionError, ValueError) as error:
        raise Refusal(
            TrainerExit.CONFIG, f"verl refuses the configuration: {' '.join(str(error).split())}"
        ) from None
    return config


def _with_wandb(run: RunSpec) -> bool:
    import importlib.util

    if run.wandb.get("mode", "disabled") == "disabled":
        return False
    if importlib.util.find_spec("wandb") is None:
        _say("wandb is not installed; metrics go to the run directory only")
        return False
    return True


def _refusal(error: Exception, attempt: Attempt) -> Refusal:
    """What an error means, wherever in Ray it was raised."""
    causes = _causes(error)
    # From the innermost on: Ray's wrappers are of the wrapped type too, with a traceback as their text.
    for cause in reversed(causes):
        if isinstance(cause, Refusal):
            return cause
        if isinstance(cause, RunDirError):
            return refusal_of(cause)
        if isinstance(cause, _settings_errors()):
            return _unless_fenced(attempt, Refusal(TrainerExit.CONFIG, " ".join(str(cause).split())))
    reason = f"{type(causes[-1]).__name__}: {' '.join(str(causes[-1]).split())[:500]}"
    return _unless_fenced(attempt, Refusal(FAILED, reason))


def _settings_errors() -> tuple[type[Exception], ...]:
    """Of the tracer and its engine: the settings do not fit the model or each other, and never will."""
    from influence.config import TracerConfigError
    from influence.recording import CaptureError
    from influence.verl_engine.compose import ConfigurationError

    return TracerConfigError, CaptureError, ConfigurationError


def _unless_fenced(attempt: Attempt, refusal: Refusal) -> Refusal:
    """Whatever went wrong: where a later attempt goes on with the run, that is the reason."""
    try:
        attempt.require_unfenced()
    except RunDirError as fenced:
        return refusal_of(fenced)
    return refusal


def _causes(error: BaseException) -> list[BaseException]:
    """The error, what caused it, and so on; Ray keeps what an actor raised in ``cause``."""
    causes = [error]
    while True:
        cause = getattr(causes[-1], "cause", None) or causes[-1].__cause__
        if not isinstance(cause, BaseException) or cause in causes:
            return causes
        causes.append(cause)


def _give_reason(descriptor: int, reason: str) -> None:
    try:
        os.write(descriptor, reason.encode()[:4000])
    except OSError as error:
        _say(f"{reason} (the parent is gone: {error.strerror})")


def _say(text: str) -> None:
    print(f"influence.train: {text}", flush=True)  # noqa: T201  (what we print is the attempt's log)


if __name__ == "__main__":
    sys.exit(main())
