"""What verl calls on ``torch.cuda`` and friends, for the CPU: nothing to synchronize, cache or count."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.cpu import current_device, current_stream, device_count, is_available, stream, synchronize
from torch.random import get_rng_state as _get_rng_state
from torch.random import set_rng_state as _set_rng_state

__all__ = [
    "current_device",
    "current_stream",
    "device_count",
    "empty_cache",
    "get_device_name",
    "get_rng_state",
    "ipc_collect",
    "is_available",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "reset_peak_memory_stats",
    "set_device",
    "set_rng_state",
    "stream",
    "synchronize",
]


def set_device(device: Any) -> None:
    """There is one device."""


def get_device_name(device: Any = None) -> str:
    return "cpu"


def empty_cache() -> None:
    """The allocator of the CPU keeps no cache of its own."""


def ipc_collect() -> None:
    """No memory handles are shared between processes."""


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Free and total memory of the machine in bytes."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page_bytes, os.sysconf("SC_PHYS_PAGES") * page_bytes


def memory_allocated(device: Any = None) -> int:
    """Not tracked on the CPU, like the three that follow."""
    return 0


def memory_reserved(device: Any = None) -> int:
    return 0


def max_memory_allocated(device: Any = None) -> int:
    return 0


def max_memory_reserved(device: Any = None) -> int:
    return 0


def reset_peak_memory_stats(device: Any = None) -> None:
    pass


def get_rng_state(device: Any = None) -> torch.Tensor:
    return _get_rng_state()


def set_rng_state(state: torch.Tensor, device: Any = None) -> None:
    _set_rng_state(state)
