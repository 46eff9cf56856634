"""Runs scenarios of the engine's tests: a process a rank, all scenarios of a number of ranks in one start."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from influence.config import TracerConfig
from influence.rundir import RunPaths, StepArrays, claim_attempt, create_run, load_step, read_run
from tests.trainer.conftest import resolve, run_document
from tests.trainer.engine_data import (
    Response,
    responses,
    save_adapter,
    save_model,
    scores_by_hand,
    with_old_log_probs,
)

ROOT = Path(__file__).parents[2]
INFLUENCE = {"influence__projection_dim_factor": 8}

Scenario = dict[str, Any]
"""``num_ranks``, ``packed``, ``dynamic``, ``checkpointing``; further keys have the defaults of `_prepare`."""


@dataclass(frozen=True)
class Outcome:
    scenario: Scenario
    paths: RunPaths
    result: dict[str, Any]
    """What the first rank saved: see `engine_worker`."""

    @property
    def config(self) -> TracerConfig:
        return TracerConfig.from_mapping(read_run(self.paths).spec["influence"])

    @property
    def arrays(self) -> StepArrays:
        return load_step(self.paths.root_dir, 1).arrays

    def metric(self, name: str) -> float:
        return float(self.result["traced"]["metrics"][f"actor/influence_trace/{name}"])


def run_scenarios(scenarios: Mapping[str, Scenario], root: Path) -> dict[str, Outcome]:
    """All of them, those with equally many ranks in the same processes."""
    save_model(root / "model")
    save_adapter(root / "model", root / "adapter")
    prepared = {name: _prepare(name, scenario, root) for name, scenario in scenarios.items()}
    for num_ranks in sorted({s["num_ranks"] for s in prepared.values()}):
        _run_ranks([s for s in prepared.values() if s["num_ranks"] == num_ranks], num_ranks, root)
    return {name: _outcome(scenario) for name, scenario in prepared.items()}


def assert_scores_by_hand(outcome: Outcome, *, relative_tolerance: float = 3e-6) -> None:
    """The committed scores are those of plain autograd at the weights before the update."""
    scenario = outcome.scenario
    rows = [Response(**row) for row in scenario["rows"]]
    model_path, adapter = Path(scenario["model"]), scenario["adapter"]
    expected = scores_by_hand(
        model_path, rows, outcome.config, adapter=adapter, factor=scenario["objective_factor"]
    )
    arrays = outcome.arrays
    tolerance = relative_tolerance * float(np.abs(arrays.scores).max())
    seen = []
    for r in range(arrays.num_rows):
        key = int(arrays.prompt_index[r]), int(arrays.session_id[r])
        span = slice(arrays.row_offsets[r], arrays.row_offsets[r + 1])
        by_hand = expected[key]
        np.testing.assert_allclose(arrays.scores[span], by_hand.scores, rtol=0, atol=tolerance)
        assert arrays.scored[r] == by_hand.scored
        seen.append(key)
    assert sorted(seen) == sorted(expected)
    assert any(e.scored for e in expected.values())
    assert np.abs(arrays.scores).max() > 0.01 * scenario["objective_factor"] ** 2


def _prepare(name: str, scenario: Scenario, root: Path) -> Scenario:
    name = f"{name[:20]}-{len(list(root.iterdir())):02d}"  # a name has at most 34 characters
    spec = resolve("alltoken-timing", "tiny-cpu", **{**INFLUENCE, **scenario.get("influence", {})})
    paths = RunPaths.of(root, f"infl-{name}")
    create_run(paths, run_document(paths.name, spec))
    claim_attempt(paths)
    rows = responses(
        4, 4, with_tool=scenario.get("with_tool", False), with_padding=scenario.get("with_padding", False)
    )
    adapter = str(root / "adapter") if scenario.get("lora") else None
    if scenario.get("on_policy"):
        rows = with_old_log_probs(root / "model", rows, adapter)
    for place, changes in scenario.get("changed_rows", {}).items():
        for column, value in changes.items():
            rows[place][column] = (
                [value] * len(rows[place]["response"]) if column == "old_log_probs" else value
            )
    defaults = {
        "epochs": 1, "compare": False, "learning_rate": 0.0, "actor": {}, "calculate_entropy": False,
        "in_place": False, "objective_factor": 1.0,
    }  # fmt: skip
    return {
        **defaults,
        **scenario,
        "mini_batch_size": len(rows) // scenario.get("num_mini_batches", 1),
        "rows": rows,
        "model": str(root / "model"),
        "adapter": adapter,
        "run_dir": str(paths.root_dir),
        "step": 1,
    }


def _outcome(scenario: Scenario) -> Outcome:
    import torch

    paths = RunPaths(Path(scenario["run_dir"]))
    return Outcome(scenario, paths, torch.load(paths.root_dir / "result.pt", weights_only=False))


def _run_ranks(scenarios: list[dict[str, Any]], num_ranks: int, root: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = root / f"scenarios-{num_ranks}.json"
    path.write_text(json.dumps(scenarios))
    ranks = []
    for rank in range(num_ranks):
        environment = {
            **os.environ, "VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "influence.cpu.platform",
            "RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.trainer.engine_worker", str(path), str(rank)]
        log = (root / f"rank-{num_ranks}-{rank}.log").open("wb")
        ranks.append((subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log), log))
    try:
        for rank, (process, log) in enumerate(ranks):
            code = process.wait(timeout=600)
            log.close()
            assert code == 0, (root / f"rank-{num_ranks}-{rank}.log").read_text()[-4000:]
    finally:
        for process, log in ranks:
            process.kill()  # ranks that wait for one that failed
            log.close()
