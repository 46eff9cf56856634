"""Notices that one of Ray's actors has died, which verl may never do.

verl waits for rollouts by looking at a queue: when the actor that fills it is killed, it waits for ever, and
so does a driver that waits for verl.
"""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray.core.generated.common_pb2 import ActorDiedErrorContext

_POLL_S = 5.0
_JOIN_S = 10.0
_MAX_CAUSE_CHARS = 300

# What follows from another actor's death (its owner's) or from an error in its constructor is left to Ray,
# which raises it where the actor was called.
_UNINTENDED = (ActorDiedErrorContext.WORKER_DIED, ActorDiedErrorContext.NODE_DIED)
_INTENDED_EXIT = "Worker exit type: INTENDED"  # `exit_actor`, or Ray ending an idle worker


def first_death(actors: Iterable[Mapping[str, Any]], job_id: str) -> str | None:
    """``Ray actor NAME (pid P) died: CAUSE`` for the first actor of a job that died without being asked to.

    Args:
        actors: rows of Ray's actor table.
        job_id: in hexadecimal digits; other jobs may share the cluster.
    """
    deaths = [
        (row["EndTime"], row, cause)
        for row in actors
        if row["JobID"] == job_id and row["State"] == "DEAD" and (cause := _unintended(row["DeathCause"]))
    ]
    if not deaths:
        return None
    _, row, cause = min(deaths, key=lambda death: death[0])
    return f"Ray actor {_name(row)} (pid {row['Pid']}) died: {cause}"


def _unintended(death: Any) -> str:
    """The cause in Ray's words, on one line; empty where somebody wanted the actor to end."""
    if death.HasField("oom_context"):
        message = death.oom_context.error_message or "out of memory"
    elif (
        death.HasField("actor_died_error_context")
        and death.actor_died_error_context.reason in _UNINTENDED
        and _INTENDED_EXIT not in death.actor_died_error_context.error_message
    ):
        message = death.actor_died_error_context.error_message or "Ray does not say why"
    else:
        return ""
    detail = message.rpartition("Worker exit detail:")[2]
    return textwrap.shorten(detail, _MAX_CAUSE_CHARS, placeholder=" ...")


def _name(row: Mapping[str, Any]) -> str:
    """The class, and the actor's own name where it has one."""
    kind = str(row["ActorClassName"]).rpartition(".")[2]
    return f"{kind} {row['Name']!r}" if row["Name"] else kind


class Watchdog:
    """Calls ``on_death`` with `first_death`'s line, once, from a thread of its own.

    A context: actors are watched from the moment that Ray is initialized until the context ends, which must
    be before Ray is shut down, as that ends actors too.
    """

    def __init__(self, on_death: Callable[[str], None], *, poll_s: float = _POLL_S) -> None:
        self._on_death = on_death
        self._poll_s = poll_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-actor-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join(_JOIN_S)

    def _watch(self) -> None:
        # Ray's public way to its actor table needs the dashboard, which few images have.
        from ray._private import state

        while not self._is_over.wait(self._poll_s):
            if not ray.is_initialized():
                continue
            try:
                rows = state.actors().values()
            except Exception:  # noqa: S112  Ray's head is busy, or gone, which ends the driver by itself
                continue
            death = first_death(rows, ray.get_runtime_context().get_job_id())
            if death and not self._is_over.is_set():
                self._on_death(death)
                return
