"""Where runs execute: one module a backend, all of them behind :class:`Backend`.

A backend reports facts and carries out orders; what the facts mean is decided in ``launcher.states``,
and what to order in ``launcher.lifecycle``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from influence.rundir import RunPaths, RunSpec
    from launcher.states import BackendFacts

# name -> (module, class); a backend is imported when it is used.
BACKENDS: Mapping[str, tuple[str, str]] = {"local": ("launcher.backends.local", "LocalBackend")}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a backend will not take a run, found out before anything is changed."""

    lacking: Sequence[str]
    """Each thing that is missing, in words: ``8 GPUs; this machine has none``."""
    device: str
    """The device that the run asks for, ``cuda`` or ``cpu``."""


class Backend(Protocol):
    """What every place where runs execute can do."""

    name: str

    def refusal(self, run: RunSpec) -> Refusal | None:
        """What the place lacks for this run, or None."""

    def submit(self, paths: RunPaths, run: RunSpec) -> bool:
        """See to it that the run, whose directory exists, is executed, once.

        A request to cancel that stands is withdrawn: submitting is the wish to go on.

        Returns:
            Whether this call started it; False when somebody else was quicker.

        Raises:
            BackendError: it could not be started.
        """

    def get(self, run: str) -> BackendFacts:
        """What is known about one run; a question that cannot be asked is ``Phase.UNREACHABLE``."""

    def list(self) -> Mapping[str, BackendFacts]:
        """All runs that the backend knows, by name, in one question."""

    def attempts(self, run: str) -> Sequence[int]:
        """The attempts that have a log, in increasing order."""

    def read_log(self, run: str, attempt: int, offset_bytes: int) -> bytes:
        """The next piece of an attempt's log; empty where there is no more by now."""

    def cancel(self, run: str, *, timeout_s: float | None = None) -> BackendFacts:
        """Stop a run for good and wait until nothing of it is left; harmless when repeated.

        Returns:
            The facts afterwards; a phase that has not ended when ``timeout_s`` passed first.
        """


def open_backend(name: str, root: Path) -> Backend:
    """A backend by its name.

    Args:
        root: the folder that holds the run directories.
    """
    module, cls = BACKENDS[name]
    backend: Backend = getattr(importlib.import_module(module), cls)(root)
    return backend
