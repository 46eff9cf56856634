"""Whether a machine has what a run asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from influence.machine import Machine, parse_bytes

# A score, a token id and a log-prob; the steps' files cannot do with much less.
_BYTES_A_TOKEN = 10
# Logs, Ray's session and a small checkpoint; below that a run is sure to end on a full disk.
_DISK_FLOOR_BYTES = 2**30


def lacking(spec: Mapping[str, Any], machine: Machine) -> list[str]:
    """What a resolved spec asks for and the machine has not; empty when it can run.

    The disk is compared with a lower bound only: the steps' arrays at full response length, without the
    checkpoints, whose size depends on the model.
    """
    hardware = spec["hardware"]
    lines = []
    if hardware["nodes"] > 1:
        lines.append(f"{hardware['nodes']} nodes (this is one machine)")
    if hardware["device"] == "cuda" and machine.num_gpus < hardware["ranks_per_node"]:
        product = f" of {hardware['gpu_product']}" if hardware["gpu_product"] else ""
        needed = _count(hardware["ranks_per_node"], "GPU")
        lines.append(f"{needed}{product} (this machine has {machine.num_gpus or 'none'})")
    if machine.num_cpus < hardware["cpus"]:
        lines.append(f"{_count(hardware['cpus'], 'CPU')} (this machine lets it use {machine.num_cpus:g})")
    memory_bytes = parse_bytes(hardware["memory"])
    if not machine.has_memory(memory_bytes):
        lines.append(f"{hardware['memory']} of memory (this machine has {_gib(machine.memory_bytes)})")
    disk_bytes = step_bytes(spec) + _DISK_FLOOR_BYTES
    if machine.free_disk_bytes is not None and machine.free_disk_bytes < disk_bytes:
        lines.append(f"{_gib(disk_bytes)} of disk space ({_gib(machine.free_disk_bytes)} are free there)")
    return lines


def enumerated(things: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(things[:-1]), *things[-1:]]))


def step_bytes(spec: Mapping[str, Any]) -> int:
    """What the arrays of all steps take at full response length, in bytes."""
    training, length = spec["training"], spec["data"]["max_response_length"]
    num_responses: int = training["prompts_per_step"] * training["responses_per_prompt"]
    return int(training["total_steps"] * num_responses * length * _BYTES_A_TOKEN)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
