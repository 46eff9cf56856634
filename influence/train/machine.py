"""What this machine, or the container that we are in, has to offer."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(k|M|G|T|Ki|Mi|Gi|Ti)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Resources that processes started from here can use."""

    num_cpus: float
    memory_bytes: int
    shared_memory_bytes: int
    num_gpus: int

    @classmethod
    def here(cls) -> Machine:
        """Measured now: affinity and cgroup limits count, not what the hardware has."""
        return cls(
            num_cpus=min(len(os.sched_getaffinity(0)), _cpu_quota()),
            memory_bytes=min(_physical_memory(), _memory_limit()),
            shared_memory_bytes=_shared_memory(),
            num_gpus=_num_gpus(),
        )


def parse_quantity(text: str) -> int:
    """Bytes of a Kubernetes quantity such as ``8Gi``.

    Raises:
        ValueError: it is none.
    """
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no quantity of memory such as 8Gi")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _cpu_quota() -> float:
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return float("inf")


def _memory_limit() -> int:
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (_CGROUP / name).read_text().strip()
            return 2**63 if text == "max" else int(text)
        except (OSError, ValueError):
            continue
    return 2**63


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _shared_memory() -> int:
    try:
        stats = os.statvfs("/dev/shm")  # noqa: S108  (asked for its size, nothing is written)
    except OSError:
        return 0
    return stats.f_frsize * stats.f_blocks


def _num_gpus() -> int:
    """GPUs by their device files, fewer where ``CUDA_VISIBLE_DEVICES`` hides some; torch is not asked."""
    num_devices = sum(
        1 for path in Path("/dev").glob("nvidia[0-9]*") if re.fullmatch(r"nvidia\d+", path.name)
    )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return num_devices
    return min(
        num_devices, len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"])
    )
