"""What a run asks for against what a machine has."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from influence import machine
from influence.machine import Machine, parse_bytes, this_machine
from launcher.machine import lacking, step_bytes

SPEC = {
    "training": {"total_steps": 2, "prompts_per_step": 48, "responses_per_prompt": 16},
    "data": {"max_response_length": 8192},
    "hardware": {
        "device": "cuda", "nodes": 1, "ranks_per_node": 8, "gpu_product": "NVIDIA-H200", "cpus": 96,
        "memory": "1500Gi",
    },
}  # fmt: skip
NODE = Machine(num_cpus=96, memory_bytes=1500 * 2**30, num_gpus=8, free_disk_bytes=10**12)


def on_cpu(**hardware: object) -> dict[str, object]:
    spec = copy.deepcopy(SPEC)
    spec["hardware"] |= {"device": "cpu", "ranks_per_node": 2, "cpus": 2, "memory": "8Gi"} | hardware
    return spec


def test_a_machine_that_has_everything_lacks_nothing() -> None:
    assert lacking(SPEC, NODE) == []


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_gpus": 0}, "8 GPUs of NVIDIA-H200 (this machine has none)"),
        ({"num_gpus": 4}, "8 GPUs of NVIDIA-H200 (this machine has 4)"),
        ({"num_cpus": 1.5}, "96 CPUs (this machine lets it use 1.5)"),
        ({"memory_bytes": 16 * 2**30}, "1500Gi of memory (this machine has 16.0 GiB)"),
        ({"free_disk_bytes": 2**20}, "1.1 GiB of disk space (0.0 GiB are free there)"),
    ],
)
def test_each_shortage_is_told_alone(changes: dict[str, int], line: str) -> None:
    assert lacking(SPEC, replace(NODE, **changes)) == [line]


def test_gpus_are_not_asked_for_on_the_cpu_and_nodes_are() -> None:
    small = Machine(num_cpus=2, memory_bytes=8 * 2**30, num_gpus=0, free_disk_bytes=10**12)
    assert lacking(on_cpu(), small) == []
    assert lacking(on_cpu(nodes=2), small) == ["2 nodes (this is one machine)"]


def test_a_machine_sold_with_as_much_memory_as_asked_is_enough() -> None:
    """MemTotal of an 8 GiB machine is some per cent below 8 GiB."""
    sold_as_8 = Machine(num_cpus=2, memory_bytes=int(7.6 * 2**30), num_gpus=0)
    assert lacking(on_cpu(), sold_as_8) == []
    assert len(lacking(on_cpu(), replace(sold_as_8, memory_bytes=7 * 2**30))) == 1


def test_step_bytes_by_hand() -> None:
    assert step_bytes(SPEC) == 2 * 768 * 8192 * 10


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1", 1),
        ("8Gi", 8 * 2**30),
        ("1500Gi", 1500 * 2**30),
        ("1.5G", 1_500_000_000),
        ("2k", 2000),
        ("0.5Ki", 512),
    ],
)
def test_quantities(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "Gi", "-1Gi", "1 Gi", "1gi", "1e3", "1GiB", "9" * 400 + "Pi", "1." + "9" * 400]
)
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="no number of bytes"):
        parse_bytes(text)


def test_this_machine_agrees_with_the_system(tmp_path: Path) -> None:
    here = this_machine(tmp_path / "not" / "there" / "yet")
    assert 0 < here.num_cpus <= len(os.sched_getaffinity(0))
    assert 0 < here.memory_bytes <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert here.free_disk_bytes is not None
    assert here.free_disk_bytes <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, 4), ("", 0), ("-1", 0), ("0", 1), ("2,0", 2), ("0,9,1", 1), ("GPU-6f1f5a,GPU-7a", 2)],
)
def test_gpus_as_cuda_counts_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str | None, expected: int
) -> None:
    """Four device files in a folder that stands for /dev, beside files that are no GPU."""
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    real = machine._listed
    monkeypatch.setattr(machine, "_listed", lambda path: real(tmp_path if path == Path("/dev") else path))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert this_machine().num_gpus == expected


def test_cgroup_limits_above_the_own_group_hold_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    inner = tmp_path / "pod" / "container"
    inner.mkdir(parents=True)
    (tmp_path / "pod" / "cpu.max").write_text("150000 100000\n")
    (inner / "cpu.max").write_text("max 100000\n")
    (inner / "memory.max").write_text("1073741824\n")
    (tmp_path / "pod" / "memory.max").write_text("max\n")
    monkeypatch.setattr(machine, "_cgroup_dirs", lambda _: [inner, tmp_path / "pod"])
    here = this_machine()
    assert here.num_cpus == min(1.5, len(os.sched_getaffinity(0)))
    assert here.memory_bytes == 2**30


def test_looking_at_the_machine_imports_no_torch() -> None:
    code = "import sys, influence.machine as m; m.this_machine(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
