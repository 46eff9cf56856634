"""Benchmarks that need a GPU say so at once where there is none."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks import verl_gpu
from influence.machine import Machine

FOLDER = Path(verl_gpu.__file__).parent


@pytest.mark.parametrize(
    "name", ["influence_pop_rows", "influence_capture", "influence_peers", "influence_two_gpus"]
)
def test_full_sizes_are_refused_with_the_option_that_works(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    benchmark = import_module(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmark, "build_model", None)  # nothing is built before the refusal
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "no GPU" in error
    assert "--tiny" in error


def test_real_verl_is_not_started_without_the_gpu_that_its_overlay_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verl_gpu, "this_machine", lambda: Machine(num_cpus=2, memory_bytes=2**33, num_gpus=0))
    with pytest.raises(SystemExit) as ended:
        verl_gpu.parse([])
    assert ended.value.code == 2
    assert "no GPU here, and the overlay tiny-gpu needs one" in capsys.readouterr().err
    assert verl_gpu.parse(["--overlay", "tiny-cpu"]).overlay == "tiny-cpu"
