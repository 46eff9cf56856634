"""Run directories made by the run directory's own writer, with synthetic scores; the tests' ground truth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from influence.rundir import (
    Attempt,
    CommitRecord,
    RunPaths,
    RunSpec,
    StepArrays,
    StepWriter,
    claim_attempt,
    create_run,
)

RUN = "infl-alltoken-timing-0221"
CAPTURED = {
    "fused_fraction": 1.0, "shared_fraction": 0.0, "separate_fraction": 0.0, "on_policy_fraction": 1.0,
    "fallback_off_policy": 0, "fallback_zero_advantage": 0, "micro_batches": 6, "groups": 3,
    "skipped_groups": 1, "interpolated_groups": 0, "double_sign_groups": 2, "nonfinite_drops": 0,
    "solve_floors": 0,
}  # fmt: skip
"""What a step's commit record says of how its responses were captured."""
_SPEC = Path(__file__).parent / "golden" / "results_spec.json"
TIMINGS = {
    "grad_staging": 0.055,
    "hessian_solve": 1.469,
    "token_scoring": 1.348,
    "score_aggregation": 0.016,
    "other": 0.544,
    "pop_rows": 3.432,
}


def settings(**changes: Any) -> dict[str, Any]:
    """``alltoken-timing`` as it was resolved once, but small: 3 prompts with 4 responses.

    ``changes`` are sections, whose keys replace those of the section.
    """
    spec: dict[str, Any] = json.loads(_SPEC.read_text())
    for section, value in changes.items():
        spec[section] = spec[section] | value if isinstance(value, dict) else value
    return spec


def step_arrays(
    spec: Mapping[str, Any], seed: int = 0, lengths: Sequence[int] | None = None, uid: str = "uid"
) -> StepArrays:
    """Groups of responses of random lengths, scores of rows in groups with contrast normally distributed."""
    random = np.random.default_rng(seed)
    responses = spec["training"]["responses_per_prompt"]
    num_rows = spec["training"]["prompts_per_step"] * responses
    response_length = np.asarray(
        random.integers(1, 9, num_rows) if lengths is None else lengths, dtype=np.int64
    )
    cap = spec["influence"]["max_tokens_per_response"]
    captured = np.minimum(response_length, cap) if cap >= 0 else response_length
    num_positions = int(captured.sum())
    group_id = np.arange(num_rows) // responses
    accepted = random.random(num_rows) > 0.5
    num_accepted = np.bincount(group_id, weights=accepted)
    scored = ((num_accepted > 0) & (num_accepted < responses))[group_id]
    scores = random.normal(size=num_positions).astype(np.float32)
    scores[~np.repeat(scored, captured)] = 0
    return StepArrays(
        row_offsets=np.concatenate([[0], np.cumsum(captured)]).astype(np.int64),
        scores=scores,
        row_id=np.arange(num_rows),
        prompt_index=group_id + 100,
        session_id=np.arange(num_rows) % responses,
        uid=[f"{uid}-{group}" for group in group_id],
        reward=accepted.astype(np.float32),
        accepted=accepted,
        scored=scored,
        group_id=group_id,
        response_length=response_length,
        token_ids=random.integers(0, 1000, num_positions),
        positions=np.concatenate([np.arange(n) for n in captured]) if cap >= 0 else None,
        tracer_config=dict(spec["influence"]),
    )


@dataclass
class SyntheticRun:
    """A run directory under construction."""

    paths: RunPaths
    spec: dict[str, Any] = field(default_factory=settings)
    wandb: dict[str, Any] = field(
        default_factory=lambda: {
            "mode": "online", "entity": "team", "project": "token-influence", "run_id": RUN, "url": None,
        }
    )  # fmt: skip
    created_at: str = "2026-02-21T09:00:00.000Z"

    @classmethod
    def make(cls, root: Path, run: str = RUN, **changes: Any) -> SyntheticRun:
        made = cls(RunPaths.of(root, run), settings(**changes))
        made.create()
        return made

    @property
    def run_spec(self) -> RunSpec:
        return RunSpec.new(
            self.paths.name, self.spec, provenance={"created_at": self.created_at}, wandb=self.wandb
        )

    def create(self) -> None:
        create_run(self.paths, self.run_spec)

    def attempt(self, resume: int = 0, **fields: Any) -> Attempt:
        """Claim the next attempt; with its log."""
        attempt = claim_attempt(self.paths, **{"host": "gpu-node-7", "package_version": "0.1.0", **fields})
        if resume:
            attempt.set_resume(resume)
        self.paths.log(attempt.number).write_text(f"attempt {attempt.number} says hello\n")
        return attempt

    def commit(
        self, attempt: Attempt, step: int, arrays: StepArrays | None = None, **fields: Any
    ) -> CommitRecord:
        """Commit a step and log its metrics as the trainer does."""
        arrays = step_arrays(self.spec, seed=step) if arrays is None else arrays
        counts = {
            "influence_trace/rows_emitted": float(arrays.num_rows),
            "influence_trace/captured_tokens": float(arrays.num_positions),
        }
        writer = StepWriter(
            self.paths, attempt.number, self.run_spec.spec_hash, store=dict(self.spec["store"])
        )
        record = writer.commit(step, arrays, **{"timings": TIMINGS, "metrics": counts, **fields})
        times = {"forward_1": 38.9, "logprob_backward": 76.42, "forward_2": 38.13, "loss_backward": 70.784,
                 "update_actor": 230.518, "step": 713.768}  # fmt: skip
        line = {"step": step, "data": {f"timing_s/{name}": value for name, value in times.items()}}
        with self.paths.metrics(attempt.number).open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        return record

    def complete(self) -> SyntheticRun:
        """One attempt that commits every step and exits 0."""
        attempt = self.attempt()
        for step in range(1, self.spec["training"]["total_steps"] + 1):
            self.commit(attempt, step)
        attempt.finish(0, "all steps committed")
        return self


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
