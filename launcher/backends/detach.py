"""Starting a supervisor that outlives the launcher, its terminal and its working directory."""

from __future__ import annotations

import os
import select
import site
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from influence.rundir import RunPaths
from influence.rundir.files import make_dir
from launcher.backends.attempt import MARKER
from launcher.backends.journal import Wish
from launcher.errors import BackendError

# A new supervisor answers after one Python start; on a machine in trouble that may take a while.
_ANSWER_TIMEOUT_S = 120.0
# Variables that belong to one run: its marker, and the document that a pod's first start is given.
_NOT_INHERITED = (MARKER, "INFL_RUN_JSON")


class Answer(StrEnum):
    """What a new supervisor says before it goes to work."""

    READY = "ready"
    TAKEN = "taken"  # another supervisor has the run


def start_supervisor(
    paths: RunPaths,
    *,
    withdraw: Mapping[Wish, str] | None = None,
    resume: bool = False,
    command: Sequence[str] = (),
) -> Answer:
    """Start a detached supervisor and wait until it has taken the run, or another one has it.

    Args:
        withdraw: ids of requests that no longer hold.
        resume: go on with the retries that the last supervisor left, instead of fresh ones.
        command: what an attempt executes; empty for the trainer.

    Raises:
        BackendError: it could not start; nothing is left running.
    """
    make_dir(paths.local_dir)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        with paths.supervisor_log.open("ab") as output:
            child = subprocess.Popen(  # noqa: S603  our own interpreter and module, as a list
                [
                    sys.executable, "-m", "launcher.backends.supervisor",
                    "--run-dir", str(paths.root_dir), "--ready-fd", str(writer),
                    *[f"--withdraw-{wish}={request}" for wish, request in (withdraw or {}).items()],
                    *(["--resume"] if resume else []),
                    *command,
                ],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                cwd=paths.root_dir, env=supervisor_environment(),
                start_new_session=True, pass_fds=[writer],
            )  # fmt: skip
        os.close(writer)
        writer = -1
        child.wait()  # it forks, and this first process ends at once
        answer = _read_answer(reader)
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    with suppress(ValueError):
        return Answer(answer)
    raise BackendError(
        f"the supervisor of run '{paths.name}' did not start",
        why=answer.removeprefix("error: ")
        or f"it ended without a word; its output is in {paths.supervisor_log}",
        next_step="repair that, then submit again: the run directory is kept",
    )


def _read_answer(reader: int) -> str:
    """What arrives before the other end closes; on a time-out, what has arrived so far."""
    chunks: list[bytes] = []
    deadline = time.monotonic() + _ANSWER_TIMEOUT_S
    while (left_s := deadline - time.monotonic()) > 0 and select.select([reader], [], [], left_s)[0]:
        chunk = os.read(reader, 65536)
        if not chunk:
            break
        chunks.append(chunk)
    return b"".join(chunks).decode("utf-8", "replace")


def supervisor_environment() -> dict[str, str]:
    """The launcher's environment, fit for another working directory and for no run in particular.

    Relative entries of PYTHONPATH, and a source tree that is importable only because the launcher was
    started inside it, become absolute.
    """
    environment = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
    entries = [str(Path(e).absolute()) for e in environment.get("PYTHONPATH", "").split(os.pathsep) if e]
    source_tree = Path(__file__).resolve().parents[2]
    installed = {Path(p).resolve() for p in [*site.getsitepackages(), site.getusersitepackages()]}
    if source_tree not in installed and str(source_tree) not in entries:
        entries.append(str(source_tree))
    if entries:
        environment["PYTHONPATH"] = os.pathsep.join(entries)
    return environment
