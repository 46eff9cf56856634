"""Real verl on one GPU: two GRPO steps with each way to capture and without our engine; skipped elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from influence.machine import this_machine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.skipif(this_machine().num_gpus == 0, reason="no GPU"),
]

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "verl_gpu.py"
TRACED = ("fused", "shared", "separate")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the benchmark finds, with projections wide enough that scores have something to agree on."""
    found = tmp_path_factory.mktemp("verl") / "found.json"
    words = [sys.executable, str(BENCHMARK), "--together", "5", "--set", "influence.projection_dim_factor=8"]
    done = subprocess.run(
        [*words, "--json", str(found)], capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-10_000:]
    document: dict[str, Any] = json.loads(found.read_text())
    return document


def test_tracing_leaves_weights_and_optimizer_as_they_are(measured: dict[str, Any]) -> None:
    # Without the first line the others would say nothing: two runs of stock verl agree, too.
    assert measured["weights"]["again"]["is_bitwise_equal"]
    for name in TRACED:
        assert measured["weights"][name]["is_bitwise_equal"], measured["weights"][name]


def test_fused_scores_are_those_of_an_extra_pass_up_to_bfloat16(measured: dict[str, Any]) -> None:
    for name in ("fused", "shared"):
        for step in measured["scores"][name].values():
            assert step["same_responses"]
            assert step["num_tokens"] > 500
            assert step["correlation"] > 0.999
            assert step["relative_error"] < 0.03


def test_every_row_was_captured_in_the_way_that_was_asked_for(measured: dict[str, Any]) -> None:
    for name in TRACED:
        run = measured["runs"][name]
        for way in TRACED:
            assert set(run[f"influence_trace/{way}_fraction"]) == {float(way == name)}
        assert set(run["influence_trace/rows_emitted"]) == {64.0}
