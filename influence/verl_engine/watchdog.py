"""Notices that one of Ray's actors or nodes has died, which verl may never do.

verl waits for rollouts by looking at a queue: when the actor that fills it is killed, it waits for ever, and
so does a driver that waits for verl. A node that dies before an actor lives on it leaves verl waiting for a
place that never comes.
"""

from __future__ import annotations

import textwrap
import threading
from collections.abc import Callable, Container, Iterable, Mapping
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


def lost_node(nodes: Iterable[Mapping[str, Any]], node_ids: Container[str]) -> str | None:
    """``Ray node ADDRESS died: CAUSE`` for a node of the run that is no longer alive.

    Args:
        nodes: rows of Ray's node table.
        node_ids: those that the run was given; others may come and go.
    """
    for row in nodes:
        if row["NodeID"] in node_ids and not row["Alive"]:
            cause = row.get("DeathReasonMessage") or "Ray does not say why"
            cause = textwrap.shorten(cause, _MAX_CAUSE_CHARS, placeholder=" ...")
            return f"Ray node {row['NodeManagerAddress']} died: {cause}"
    return None


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
    """Calls ``on_death`` with `lost_node`'s or `first_death`'s line, once, from a thread of its own.

    A context: actors are watched from the moment that Ray is initialized until the context ends, which must
    be before Ray is shut down, as that ends actors too.

    Args:
        node_ids: nodes of a cluster that the run needs to the end.
    """

    def __init__(
        self, on_death: Callable[[str], None], *, node_ids: Container[str] = (), poll_s: float = _POLL_S
    ) -> None:
        self._on_death = on_death
        self._node_ids = node_ids
        self._poll_s = poll_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-actor-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()
        self._thread.join(_JOIN_S)

    def lost_node(self) -> str | None:
        """`lost_node`'s line, asked now; what it says explains whatever verl fails with."""
        try:
            return lost_node(ray.nodes(), self._node_ids) if self._node_ids else None
        except Exception:  # Ray's head is gone too
            return None

    def _watch(self) -> None:
        # Ray's public way to its actor table needs the dashboard, which few images have.
        from ray._private import state

        while not self._is_over.wait(self._poll_s):
            if not ray.is_initialized():
                continue
            try:
                nodes, actors = ray.nodes() if self._node_ids else [], state.actors().values()
            except Exception:  # noqa: S112  Ray's head is busy, or gone, which ends the driver by itself
                continue
            death = lost_node(nodes, self._node_ids) or first_death(
                actors, ray.get_runtime_context().get_job_id()
            )
            if death and not self._is_over.is_set():
                self._on_death(death)
                return
