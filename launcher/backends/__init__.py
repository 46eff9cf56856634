"""Where runs execute: one module a backend, all of them behind :class:`Backend`.

A backend reports facts and carries out orders; what the facts mean is decided in ``launcher.states``,
and what to order in ``launcher.lifecycle``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from launcher.errors import BackendError

if TYPE_CHECKING:
    from influence.rundir import RunSpec
    from influence.rundir.exits import Verdict
    from launcher.profiles import Profile
    from launcher.states import BackendFacts

# name -> (module, class); a backend is imported when it is used.
BACKENDS: Mapping[str, tuple[str, str]] = {
    "local": ("launcher.backends.local", "LocalBackend"),
    "kubernetes": ("launcher.backends.kubernetes", "KubernetesBackend"),
    "kuberay": ("launcher.backends.kuberay", "KuberayBackend"),
    "runai": ("launcher.backends.runai", "RunaiBackend"),
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a backend will not take a run, found out before anything is changed."""

    lacking: Sequence[str]
    """Each thing that is missing, in words: ``8 GPUs (this machine has none)``."""
    device: str
    """The device that the run asks for, ``cuda`` or ``cpu``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFacts:
    """What a backend knows of one attempt; ``launcher explain`` lays the trainer's own record beside it."""

    where: str
    """``pod infl-smoke-0221-x7k2p on node gpu-3``, ``process 4711 on host ada``."""
    number: int | None = None
    """The number that the trainer claimed; None where the backend cannot know it (it never came that far)."""
    pod: str | None = None
    """The pod's name, by which the trainer's record of the same attempt is found."""
    started_at: str | None = None
    ended_at: str | None = None
    """ISO 8601, UTC."""
    begun: bool = True
    """False while its process has not started: its pod waits, and ``started_at`` is the pod's."""
    exit_code: int | None = None
    """0..255, or ``-signal``; None while it goes on, or where nothing exited."""
    ended_by: str | None = None
    """What ended it, in words: ``evicted: the node was low on memory``; None while it goes on."""
    verdict: Verdict | None = None
    """How the backend counted it; None while it goes on or where the backend does not say."""
    decision: str | None = None
    """What was done then, and why: ``started again, charged: retry 2 of 4``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to a run, as its backend tells it."""

    at: str
    """ISO 8601, UTC; of the latest, where it happened several times."""
    about: str
    """What it happened to: ``Job infl-smoke-0221``, ``Pod ...``, ``supervisor``."""
    reason: str
    """One word of the backend: ``FailedScheduling``."""
    message: str
    warning: bool = False
    count: int = 1


class OrderStands(KeyboardInterrupt):
    """Ctrl-C came while an order was awaited that its place had taken: it is carried out all the same."""


@contextmanager
def order_taken() -> Iterator[None]:
    """Around the wait for an order that was answered: Ctrl-C becomes OrderStands."""
    try:
        yield
    except KeyboardInterrupt:
        raise OrderStands from None


class Backend(Protocol):
    """What every place where runs execute can do.

    Every method may raise BackendError: the place did not answer in time, refuses, or a right is missing; the
    message names which, and what to do. ``get`` and ``list`` do not: they answer ``Phase.UNREACHABLE``.
    """

    name: str

    def refusal(self, run: RunSpec) -> Refusal | None:
        """What the place lacks for this run, or None; asks and changes nothing."""

    def document(self, run: str) -> RunSpec | None:
        """The run of this name as the backend holds it, or None where there is none.

        Raises:
            RunDirError, BackendError: something stands under the name that is no run.
        """

    def submit(self, run: RunSpec) -> bool:
        """See to it that the run is executed, once.

        One under way is left alone; one that ended is started again with fresh retries; a request to cancel
        that stands is withdrawn, since submitting is the wish to go on. Nothing is deleted for it.

        Returns:
            Whether this call started it; False when somebody else was quicker.

        Raises:
            ConflictError: another spec has the name (``influence.rundir``'s, with the difference).
            BackendError: it could not be started.
        """

    def get(self, run: str) -> BackendFacts:
        """What is known about one run; ``Phase.ABSENT`` where nothing is, ``Phase.UNREACHABLE`` where the
        question cannot be asked."""

    def list(self) -> Mapping[str, BackendFacts]:
        """All runs that the backend knows, by name, in one question.

        Raises:
            BackendError: the question cannot be asked.
        """

    def attempts(self, run: str) -> Sequence[int]:
        """The attempts that have a log here, in increasing order."""

    def read_log(self, run: str, attempt: int, offset_bytes: int) -> bytes:
        """The next piece of an attempt's log; empty where there is no more by now."""

    def history(self, run: str) -> Sequence[AttemptFacts]:
        """What became of every attempt that is still known, the oldest first."""

    def events(self, run: str) -> Sequence[Event]:
        """What happened to the run, the oldest first."""

    def cancel(self, run: str, *, timeout_s: float | None = None) -> BackendFacts:
        """Stop a run for good and wait until nothing of it is left; harmless when repeated.

        Returns:
            The facts afterwards; a phase that has not ended when ``timeout_s`` passed first.

        Raises:
            OrderStands: Ctrl-C during the wait; a bare KeyboardInterrupt says nothing about the order.
        """

    def suspend(self, run: str, *, timeout_s: float | None = None) -> BackendFacts:
        """Stop a run so that it gives its machines back, uncharged, and can go on; waits as ``cancel``."""

    def resume(self, run: str) -> BackendFacts:
        """Let a suspended run go on; harmless where it is not suspended."""


def open_backend(profile: Profile) -> Backend:
    """The backend of a profile.

    Raises:
        BackendError: what it needs is not there (no kubeconfig, no such context, no credentials).
    """
    module, cls = BACKENDS[profile.backend]
    backend: Backend = getattr(import_for(profile.backend, module), cls)(profile)
    return backend


def import_for(backend: str, module: str) -> ModuleType:
    """A module that only this backend needs.

    Raises:
        BackendError: it, or a package that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise BackendError(
            f"the backend '{backend}' cannot be used",
            why=f"this installation lacks the module {error.name}",
            next_step="pip install --upgrade influence-launcher",
        ) from error
