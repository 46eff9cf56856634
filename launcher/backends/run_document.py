"""The run document on a cluster: it travels in the environment of the trainer's container, and is read back.

So one object is all that a submit creates, and whoever may see the object can see what run it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from influence.rundir import RunDirError, RunSpec
from influence.rundir.spec import canonical_json
from launcher.errors import BackendError, SpecError

VARIABLE = "INFL_RUN_JSON"
MAX_BYTES = 100_000
"""Linux takes 128 KiB in one environment string, name included."""


def run_json(run: RunSpec) -> str:
    """The document as text, before templates escape it (``render.env_value``).

    Raises:
        SpecError: it is larger than an environment variable may be.
    """
    written = canonical_json(run.to_dict())
    if len(written) > MAX_BYTES:
        raise SpecError(
            f"the run document takes {len(written)} bytes, and {MAX_BYTES} is the most on a cluster",
            why="it travels in an environment variable, and Linux takes 128 KiB in one",
            next_step="shorten lists such as data.train_files and the texts below verl",
        )
    return written.decode()


def read_document(env: Iterable[Mapping[str, Any]], *, where: str) -> RunSpec:
    """The run that a container's environment holds.

    Args:
        env: the container's ``env``: names and values.
        where: the object, for the message.

    Raises:
        BackendError: there is none, or it was altered.
    """
    written = next((entry.get("value") for entry in env if entry.get("name") == VARIABLE), None)
    if not isinstance(written, str):
        raise BackendError(
            f"{where} is no run of the launcher's: its environment has no {VARIABLE}",
            next_step="choose another --name for the run, or have that object removed",
        )
    try:
        return RunSpec.from_dict(json.loads(written.replace("$$", "$")))
    except (ValueError, RecursionError, RunDirError) as error:
        reason = error.reason if isinstance(error, RunDirError) else "not valid JSON"
        raise BackendError(
            f"{where}: the run document in its environment cannot be used: {reason}",
            next_step="use the version of the launcher that submitted it, or choose another --name",
        ) from None


def document_of_pod(spec: Mapping[str, Any], *, run: object, where: str) -> RunSpec:
    """The run that a pod's spec, or a pod template's, holds in one of its containers.

    Args:
        run: the name of the run that the object's label tells; one that was copied and renamed holds another.

    Raises:
        BackendError: as ``read_document``, or it is another run's.
    """
    entries = [entry for container in spec.get("containers") or [] for entry in container.get("env") or []]
    document = read_document(entries, where=where)
    if document.run != run:
        raise BackendError(
            f"{where}: its label names the run {run!r}, its run document '{document.run}'",
            why="somebody copied another run's object",
            next_step="choose another --name for the run, or have that object removed",
        )
    return document
