"""Runs and steps for the tests: small, and different wherever a test must tell two apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from influence.rundir import Attempt, RunPaths, RunSpec, StepArrays, StepWriter, create_run

RUN = "infl-test-0221"
SPEC = {"preset": "test", "influence": {"damping": 0.1}, "store": {"scores_dtype": "float32"}}
STORE = {"scores_dtype": "float32", "columns": ["token_ids", "log_probs", "advantages"]}


def new_run(root: Path) -> RunPaths:
    paths = RunPaths.of(root, RUN)
    create_run(paths, RunSpec.new(RUN, SPEC))
    return paths


def step_arrays(seed: int = 0, lengths: tuple[int, ...] = (3, 0, 2)) -> StepArrays:
    """Rows of these lengths with random values; the same seed gives the same values."""
    random = np.random.default_rng(seed)
    num_rows, num_positions = len(lengths), sum(lengths)
    return StepArrays(
        row_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        scores=random.normal(size=num_positions).astype(np.float32),
        row_id=np.arange(num_rows),
        prompt_index=random.integers(0, 1000, num_rows),
        session_id=np.arange(num_rows) % 4,
        uid=[f"uid-{i}" for i in range(num_rows)],
        reward=random.random(num_rows).astype(np.float32),
        accepted=random.random(num_rows) > 0.5,
        scored=np.ones(num_rows, dtype=bool),
        group_id=np.arange(num_rows) // 2,
        response_length=np.array(lengths, dtype=np.int64),
        token_ids=random.integers(0, 150_000, num_positions),
        log_probs=-random.random(num_positions).astype(np.float32),
        advantages=random.normal(size=num_rows).astype(np.float32),
        tracer_config={"damping": 0.1, "modules": ["q_proj"]},
    )


def writer(paths: RunPaths, attempt: Attempt) -> StepWriter:
    return StepWriter(paths, attempt.number, RunSpec.new(RUN, SPEC).spec_hash, store=STORE)


def commit(paths: RunPaths, attempt: Attempt, step: int, seed: int = 0):
    return writer(paths, attempt).commit(step, step_arrays(seed), timings={"pop_rows": 0.5}, metrics={})


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too, with its content."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def temporaries(directory: Path) -> list[str]:
    return [name for name in tree(directory) if name.endswith(".tmp")]
