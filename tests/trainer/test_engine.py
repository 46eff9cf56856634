"""The engine in verl's own training worker: its scores are those of plain autograd on the plain model.

Real verl (FSDP, micro-batching, loss, optimizer, metrics), one process a rank, no Ray and no rollout.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from influence.config import TracerConfig
from influence.rundir import RunPaths, claim_attempt, create_run, load_step, read_run
from tests.trainer.conftest import resolve, run_document

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
INFLUENCE = {"influence__projection_dim_factor": 8}

# Between them: padded and packed, fixed and dynamic micro-batches, with and without checkpointing, one and
# several mini-batches and epochs, both objectives, all contrasts, a tool's tokens, padding rows. FSDP2 only:
# torch's FSDP1 does not run on a CPU.
SCENARIOS: dict[str, dict[str, Any]] = {
    "padded": {
        "num_ranks": 1, "packed": False, "dynamic": False, "checkpointing": False, "compare": True,
        "learning_rate": 1e-3, "with_tool": True,
    },
    "packed": {
        "num_ranks": 1, "packed": True, "dynamic": True, "checkpointing": True, "compare": True,
        "learning_rate": 1e-3, "epochs": 2,
        "influence": {"influence__contrast": "none", "influence__objective": "log_prob",
                      "influence__max_tokens_per_response": 4},
    },
    "leave-one-out": {
        "num_ranks": 1, "packed": True, "dynamic": False, "checkpointing": True,
        "influence": {"influence__exclude_self": True, "influence__damping_mode": "trace_over_responses"},
    },
    "two-ranks-padded": {
        "num_ranks": 2, "packed": False, "dynamic": False, "checkpointing": True, "compare": True,
        "learning_rate": 1e-3, "with_padding": True, "influence": {"influence__contrast": "advantage"},
    },
    "two-ranks-packed": {
        "num_ranks": 2, "packed": True, "dynamic": True, "checkpointing": False, "num_mini_batches": 2,
        "epochs": 2,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    scenario: dict[str, Any]
    paths: RunPaths
    result: dict[str, Any]


def _prepare(name: str, scenario: dict[str, Any], root: Path, model: Path) -> dict[str, Any]:
    from tests.trainer.engine_data import responses

    spec = resolve("alltoken-timing", "tiny-cpu", **{**INFLUENCE, **scenario.get("influence", {})})
    paths = RunPaths.of(root, f"infl-{name}")
    create_run(paths, run_document(paths.name, spec))
    claim_attempt(paths)
    rows = responses(
        4, 4, with_tool=scenario.get("with_tool", False), with_padding=scenario.get("with_padding", False)
    )
    defaults = {"epochs": 1, "compare": False, "learning_rate": 0.0}
    return {
        **defaults,
        **scenario,
        "mini_batch_size": len(rows) // scenario.get("num_mini_batches", 1),
        "rows": rows,
        "model": str(model),
        "run_dir": str(paths.root_dir),
        "step": 1,
    }


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
    for rank, (process, log) in enumerate(ranks):
        code = process.wait(timeout=300)
        log.close()
        assert code == 0, (root / f"rank-{num_ranks}-{rank}.log").read_text()[-4000:]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    import torch

    from tests.trainer.engine_data import save_model

    root = tmp_path_factory.mktemp("engine")
    save_model(root / "model")
    prepared = {name: _prepare(name, scenario, root, root / "model") for name, scenario in SCENARIOS.items()}
    for num_ranks in (1, 2):
        _run_ranks([s for s in prepared.values() if s["num_ranks"] == num_ranks], num_ranks, root)
    outcomes = {}
    for name, scenario in prepared.items():
        paths = RunPaths(Path(scenario["run_dir"]))
        outcomes[name] = Outcome(
            scenario, paths, torch.load(paths.root_dir / "result.pt", weights_only=False)
        )
    return outcomes


@pytest.fixture(params=SCENARIOS)
def outcome(request: pytest.FixtureRequest, outcomes: dict[str, Outcome]) -> Outcome:
    return outcomes[request.param]


def test_scores_are_those_of_the_plain_model(outcome: Outcome) -> None:
    from tests.trainer.engine_data import Response, scores_by_hand

    config = TracerConfig.from_mapping(read_run(outcome.paths).spec["influence"])
    rows = [Response(**row) for row in outcome.scenario["rows"]]
    expected = scores_by_hand(Path(outcome.scenario["model"]), rows, config)
    arrays = load_step(outcome.paths.root_dir, 1).arrays
    tolerance = 3e-6 * float(np.abs(arrays.scores).max())
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
    ranks_of_prompt: dict[int, set[int]] = {}
    for place, row in enumerate(rows):
        ranks_of_prompt.setdefault(row.prompt_index, set()).add(place % outcome.scenario["num_ranks"])
    assert any(len(ranks) == outcome.scenario["num_ranks"] for ranks in ranks_of_prompt.values())
    assert np.abs(arrays.scores).max() > 0.01


def test_columns_are_those_of_the_responses(outcome: Outcome) -> None:
    arrays = load_step(outcome.paths.root_dir, 1).arrays
    config = TracerConfig.from_mapping(read_run(outcome.paths).spec["influence"])
    rows = {(r["prompt_index"], r["session_id"]): r for r in outcome.scenario["rows"]}
    cap = config.max_tokens_per_response
    for r in range(arrays.num_rows):
        row = rows[int(arrays.prompt_index[r]), int(arrays.session_id[r])]
        span = slice(arrays.row_offsets[r], arrays.row_offsets[r + 1])
        own = [token for token, is_own in enumerate(row["mask"]) if is_own]
        places = own if arrays.positions is None else arrays.positions[span].tolist()
        assert len(places) == (len(own) if cap < 0 else min(cap, len(own)))
        assert set(places) <= set(own)
        assert arrays.token_ids[span].tolist() == [row["response"][place] for place in places]
        assert arrays.response_length[r] == len(row["response"])
        assert (arrays.reward[r], arrays.uid[r]) == (row["reward"], row["uid"])
    if cap < 0 and not outcome.scenario.get("with_tool"):
        assert arrays.positions is None


def test_metrics_are_sums_over_ranks_reported_once(outcome: Outcome) -> None:
    metrics = outcome.result["traced"]["metrics"]
    arrays = load_step(outcome.paths.root_dir, 1).arrays
    assert metrics["actor/influence_trace/rows_emitted"] == arrays.num_rows
    assert metrics["actor/influence_trace/captured_tokens"] == arrays.num_positions
    assert metrics["actor/influence_trace/groups"] == 4
    assert metrics["actor/influence_trace/skipped_groups"] == 0
    phases = ["grad_staging", "hessian_solve", "token_scoring", "score_aggregation", "other"]
    timings = load_step(outcome.paths.root_dir, 1).record.timings
    for phase in (*phases, "pop_rows", "capture", "forward_1", "logprob_backward", "forward_2"):
        assert metrics[f"actor/timing_s/influence_{phase}"] == pytest.approx(timings[phase])
        assert timings[phase] >= 0
    if outcome.scenario["num_ranks"] == 1:
        assert timings["pop_rows"] == pytest.approx(sum(timings[phase] for phase in phases))
    assert timings["update_actor"] > timings["capture"] + timings["pop_rows"]


def test_training_is_bitwise_what_it_is_without_tracing(outcomes: dict[str, Outcome]) -> None:
    import torch

    compared = [outcome for outcome in outcomes.values() if outcome.scenario["compare"]]
    assert len(compared) == 3
    for outcome in compared:
        traced, stock = outcome.result["traced"], outcome.result["stock"]
        changed = 0
        for name, weight in stock["weights"].items():
            assert torch.equal(traced["weights"][name], weight), name
            changed += 1
        assert changed > 10
        assert torch.equal(traced["random"], stock["random"])
        assert traced["gradients_left"] == stock["gradients_left"]
        for name in ("actor/loss", "actor/grad_norm", "actor/pg_loss"):
            assert traced["metrics"][name] == stock["metrics"][name]
        assert not [name for name in stock["metrics"] if "influence" in name]
