"""A run on several nodes: finding the Ray cluster that it joins, and checking that it can work there.

verl waits for ever, without a word, for actors that Ray cannot place, and what it writes to a folder that
only one node sees is lost. So both are found out before it starts.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from influence.rundir import Attempt, RunPaths, TrainerExit
from influence.train.node import NodeProblem, node_problem
from influence.train.refusal import FAILED, Refusal
from influence.train.version import installed_version
from influence.verl_engine.overrides import num_logical_cpus

_ACCELERATOR = "GPU"
"""Ray's resource that verl counts, one a rank; on the CPU it stands for a rank's place."""

NODES_WAIT_S = 600.0
"""How long nodes may take to join, and an earlier attempt's actors to leave."""

_HEAD_WAIT_S = 30.0
_POLL_S = 2.0
_SAY_EVERY_S = 30.0
_ANSWER_WAIT_S = 180.0  # a worker process on a node that imports for the first time
# A name that verl's queue takes once a cluster: a second run would get the first one's data.
_QUEUE_ACTOR = {"name": "TransferQueueController", "namespace": "transfer_queue"}


def ray_address() -> str:
    """The Ray cluster to join: ``RAY_ADDRESS``, else the one that runs on this machine (``auto``).

    Raises:
        Refusal: ``RAY_ADDRESS`` names none that a driver can join.
    """
    address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "local" or "://" in address:
        raise Refusal(
            TrainerExit.CONFIG,
            f"RAY_ADDRESS is {address}, and a run on several nodes joins a Ray cluster from one of its "
            "nodes; set it to HOST:PORT of the cluster's head, or leave it out there",
        )
    return address


def require_cluster(
    spec: Mapping[str, Any],
    paths: RunPaths,
    attempt: Attempt,
    address: str,
    say: Callable[[str], None],
    *,
    wait_s: float = NODES_WAIT_S,
) -> frozenset[str]:
    """Connect to the cluster, wait until it has the run's nodes free, ask each of them, and disconnect.

    Args:
        say: told from time to time what is waited for.

    Returns:
        The ids of the nodes that have accelerators for the run; exactly as many as it needs, if the cluster
        is its own.

    Raises:
        Refusal: there is no cluster; the nodes did not come in time (worth another try); or a node cannot
            take its part, with its address and the reason.
    """
    hardware = spec["hardware"]
    _connect(address, hardware["nodes"])
    try:
        nodes = _wait_for_nodes(hardware, say, wait_s)
        _require_nodes(spec, paths, attempt, nodes)
        return frozenset(node.node_id for node in nodes)
    finally:
        ray.shutdown()


@dataclass(frozen=True, slots=True)
class Node:
    """A live node of the cluster and what is free on it."""

    node_id: str
    address: str
    num_accelerators: float
    num_cpus: float


def lacking(nodes: list[Node], num_nodes: int, ranks_per_node: int) -> str | None:
    """What the free nodes lack for a run, in words; None when it can start."""
    ready = [node for node in nodes if node.num_accelerators >= ranks_per_node]
    if len(ready) < num_nodes:
        found = ", ".join(f"{node.address}: {node.num_accelerators:g}" for node in nodes) or "none"
        return (
            f"{len(ready)} of {num_nodes} nodes with {ranks_per_node} free {_ACCELERATOR} of Ray's "
            f"(there are {found})"
        )
    num_cpus, wanted = sum(node.num_cpus for node in nodes), num_logical_cpus(num_nodes * ranks_per_node)
    if num_cpus < wanted:
        return f"{num_cpus:g} free CPUs of Ray's and verl's actors take {wanted} (ray start --num-cpus)"
    return None


def _connect(address: str, num_nodes: int) -> None:
    if address != "auto":
        _require_listening(address)
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        detail = " ".join(str(error).split())[:300]
        if address == "auto":
            raise Refusal(
                TrainerExit.CONFIG,
                f"hardware.nodes is {num_nodes} and there is no Ray cluster here to join ({detail}); start "
                "one (ray start), or submit to a cluster",
            ) from None
        raise Refusal(
            FAILED,
            f"the Ray cluster at {address} cannot be joined: {detail}; is it up, is this machine one of its "
            "nodes, and are RAY_AUTH_MODE and the token the cluster's?",
        ) from None


def _require_listening(address: str) -> None:
    """Ray itself would try for minutes, and say little."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise Refusal(
            TrainerExit.CONFIG, f"RAY_ADDRESS is {address}; it must be HOST:PORT of the cluster's head"
        )
    give_up_at = time.monotonic() + _HEAD_WAIT_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_POLL_S).close()
        except (OSError, OverflowError) as error:
            if time.monotonic() >= give_up_at:
                raise Refusal(
                    FAILED, f"the Ray cluster at {address} cannot be joined: nothing answers there ({error})"
                ) from None
            time.sleep(_POLL_S)
        else:
            return


def _wait_for_nodes(hardware: Mapping[str, Any], say: Callable[[str], None], wait_s: float) -> list[Node]:
    """The nodes with the accelerators, as soon as there are enough."""
    give_up_at, say_at = time.monotonic() + wait_s, 0.0
    while True:
        nodes = _free_nodes()
        missing = lacking(nodes, hardware["nodes"], hardware["ranks_per_node"])
        if missing is None and _is_queue_taken():
            missing = "another verl run in this Ray cluster, or an earlier attempt that is still ending"
        if missing is None:
            return [node for node in nodes if node.num_accelerators >= hardware["ranks_per_node"]]
        now = time.monotonic()
        if now >= give_up_at:
            raise Refusal(
                FAILED, f"waited {wait_s:g} s for the Ray cluster's nodes in vain: there is {missing}"
            )
        if now >= say_at:
            say(f"waiting for the Ray cluster's nodes: there is {missing}")
            say_at = now + _SAY_EVERY_S
        time.sleep(_POLL_S)


def _free_nodes() -> list[Node]:
    from ray._private import state  # Ray's public way to what is free by node needs the dashboard

    free = state.available_resources_per_node()
    return sorted(
        (
            Node(
                node["NodeID"],
                node["NodeManagerAddress"],
                free.get(node["NodeID"], {}).get(_ACCELERATOR, 0.0),
                free.get(node["NodeID"], {}).get("CPU", 0.0),
            )
            for node in ray.nodes()
            if node["Alive"]
        ),
        key=lambda node: (node.address, node.node_id),
    )


def _is_queue_taken() -> bool:
    try:
        ray.get_actor(**_QUEUE_ACTOR)
    except ValueError:
        return False
    return True


def _require_nodes(spec: Mapping[str, Any], paths: RunPaths, attempt: Attempt, nodes: list[Node]) -> None:
    task = ray.remote(node_problem)
    answers = [
        task.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
        ).remote(dict(spec), str(paths.root_dir.resolve()), attempt.record, installed_version())
        for node in nodes
    ]
    give_up_at = time.monotonic() + _ANSWER_WAIT_S
    for node, answer in zip(nodes, answers, strict=True):
        try:
            problem: NodeProblem | None = ray.get(answer, timeout=max(0.0, give_up_at - time.monotonic()))
        except RayError as error:
            detail = " ".join(str(error).split())[-300:]
            raise Refusal(FAILED, f"node {node.address} cannot be asked: {detail}") from None
        if problem is not None:
            raise Refusal(problem.code, f"node {node.address}: {problem.reason}")
