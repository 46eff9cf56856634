"""One of several nodes, asked from inside whether it can take its part of a run. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influence.machine import this_machine
from influence.rundir import Attempt, AttemptRecord, RunDirError, RunPaths, TrainerExit
from influence.train.preflight import node_preflight
from influence.train.refusal import Refusal
from influence.train.version import installed_version


@dataclass(frozen=True, slots=True)
class NodeProblem:
    """Why a node cannot take part; a `Refusal` that travels between processes."""

    code: int
    reason: str


def node_problem(
    spec: Mapping[str, Any], run_dir: str, claim: AttemptRecord, package_version: str
) -> NodeProblem | None:
    """What this node lacks for the run, None if nothing.

    Args:
        claim: the attempt's record as the driver sees it. No other run directory holds an equal one, so that
            it tells whether this node sees the same storage.
        package_version: of the driver's package.
    """
    try:
        own_version = installed_version()
        if own_version != package_version:
            raise Refusal(
                TrainerExit.CONFIG,
                f"influence-launcher {own_version} is installed and the driver has {package_version}; "
                "use one image on all nodes",
            )
        _require_shared(RunPaths(Path(run_dir)), claim)
        node_preflight(spec, this_machine())
    except Refusal as refusal:
        return NodeProblem(refusal.code, refusal.reason)
    return None


def _require_shared(paths: RunPaths, claim: AttemptRecord) -> None:
    try:
        own = Attempt(paths, claim.number).record
    except RunDirError as error:
        raise _not_shared(paths, f"there is no record of attempt {claim.number} that can be read") from error
    if own != claim:
        raise _not_shared(paths, f"its record of attempt {claim.number} is another")
    if not os.access(paths.root_dir, os.W_OK | os.X_OK):
        raise Refusal(TrainerExit.CONFIG, f"{paths.root_dir} cannot be written there by user {os.geteuid()}")


def _not_shared(paths: RunPaths, detail: str) -> Refusal:
    return Refusal(
        TrainerExit.CONFIG,
        f"{paths.root_dir} is not the driver's run directory: {detail}; "
        "mount the same storage at the same path on every node",
    )
