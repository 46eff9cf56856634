"""What this machine, or the container that we are in, has for a run: processors, memory, disk and GPUs.

Standard library only: the launcher asks before it starts a run, the trainer before it starts verl, and both
must get the same answer. GPUs are counted by their device files, which a container has exactly for the GPUs
that it was given; importing torch to ask CUDA would cost seconds and memory on the GPU.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15,
          "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}  # fmt: skip
_QUANTITY = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)(k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?")

# A machine sold with 8 GiB reports a little less: the kernel and the firmware keep some.
_MEMORY_TOLERANCE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a run can use here."""

    num_cpus: float
    """Processors that this process may use; a fraction where a cgroup limits the time."""
    memory_bytes: int
    """The machine's memory, or the cgroup's limit where that is lower."""
    num_gpus: int
    gpu_models: tuple[str, ...] = ()
    """One name a GPU, as the driver tells it; empty where it does not."""
    shared_memory_bytes: int = 0
    """The size of /dev/shm."""
    free_disk_bytes: int | None = None
    """Free where the run directories go; None where that cannot be found out."""

    def has_memory(self, num_bytes: int) -> bool:
        """Whether a machine of that much memory is what this one is; a tenth less is tolerated."""
        return self.memory_bytes >= _MEMORY_TOLERANCE * num_bytes


def this_machine(root: Path | None = None) -> Machine:
    """Look at this machine.

    Args:
        root: where the run directories go, for the free disk space; need not exist yet.
    """
    gpus = _gpus()
    return Machine(
        num_cpus=_num_cpus(),
        memory_bytes=_memory_bytes(),
        num_gpus=len(gpus),
        gpu_models=_gpu_models() if gpus else (),
        shared_memory_bytes=_size_bytes(Path("/dev/shm")),  # noqa: S108 - asked for its size only
        free_disk_bytes=None if root is None else _free_disk_bytes(root),
    )


def parse_bytes(quantity: str) -> int:
    """A Kubernetes quantity of bytes, such as ``8Gi`` or ``1.5G``, as a number.

    Raises:
        ValueError: it is none.
    """
    match = _QUANTITY.fullmatch(quantity)
    if match is None:
        raise ValueError(f"{quantity[:40]!r} is no number of bytes with a unit, such as 8Gi")
    return math.ceil(float(match[1]) * _UNITS[match[2] or ""])


def _num_cpus() -> float:
    num_cpus = float(len(os.sched_getaffinity(0)))
    for directory in _cgroup_dirs("cpu"):
        quota = _words(directory / "cpu.max") or [
            *_words(directory / "cpu.cfs_quota_us"),
            *_words(directory / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
            num_cpus = min(num_cpus, int(quota[0]) / int(quota[1]))
    return num_cpus


def _memory_bytes() -> int:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for directory in _cgroup_dirs("memory"):
        limit = _words(directory / "memory.max") or _words(directory / "memory.limit_in_bytes")
        if limit and limit[0].isdigit():
            memory_bytes = min(memory_bytes, int(limit[0]))
    return memory_bytes


def _cgroup_dirs(controller: str) -> list[Path]:
    """The cgroup's own directory and those above it, whose limits hold too (versions 2 and 1)."""
    top = Path("/sys/fs/cgroup")
    directories = []
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            base = top / controller if controllers else top
            own = base / path.lstrip("/")
            # In a container the path may be the host's; what is mounted at the top is the container's own.
            directories += [d for d in (own, *own.parents) if d == base or base in d.parents]
    return directories


def _gpus() -> list[str]:
    """The NVIDIA devices that CUDA would show this process, by device file or visible id."""
    files = [p.name for p in _listed(Path("/dev")) if re.fullmatch(r"nvidia[0-9]+", p.name)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not files:
        return files
    shown = []
    for entry in visible.split(","):
        # CUDA stops reading at the first entry that names no device.
        if not entry.strip() or (entry.strip().lstrip("-").isdigit() and not 0 <= int(entry) < len(files)):
            break
        shown.append(entry.strip())
    return shown


def _gpu_models() -> tuple[str, ...]:
    models = []
    for directory in _listed(Path("/proc/driver/nvidia/gpus")):
        for line in _lines(directory / "information"):
            key, _, value = line.partition(":")
            if key == "Model":
                models.append(value.strip())
    return tuple(models)


def _free_disk_bytes(root: Path) -> int | None:
    directory = root.absolute()
    while not directory.is_dir():
        directory = directory.parent
    try:
        status = os.statvfs(directory)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def _size_bytes(mount: Path) -> int:
    try:
        status = os.statvfs(mount)
    except OSError:
        return 0
    return status.f_frsize * status.f_blocks


def _listed(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()
