"""Train a run with verl's own engine: everything as in a traced run, and nothing traced.

    launcher render --preset smoke --overlay tiny-gpu --backend local --name NAME > run.json
    python benchmarks/stock_verl.py --root DIR < run.json

What a traced run is compared with. Prompts have the same names and responses the same order, which are the
trainer's doing (`influence.verl_engine.trainer`); the engine is the one that verl picks by itself. Metrics
and checkpoints go to the run directory, as always; there are no steps to commit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from influence.rundir import RunPaths, RunSpec, claim_attempt, create_run
from influence.train.child import verl_config
from influence.train.parent import child_environment
from influence.train.version import installed_version

ROLLOUT_ALONE = "influence.hf_cpu.replica"
"""verl imports it in place of our library: it brings the rollout and leaves the engines as they are."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="where run directories go")
    args = parser.parse_args()
    run = RunSpec.from_dict(json.load(sys.stdin))
    paths = RunPaths.of(args.root, run.run)
    create_run(paths, run)
    attempt = claim_attempt(paths, package_version=installed_version())
    os.environ |= child_environment(run, paths, attempt.number)
    os.environ["VERL_ENGINE_DEVICE"] = "cuda"  # verl has one engine for GPUs and, by this name, for the CPU

    import ray
    from verl.trainer.main_ppo import run_ppo

    from influence.verl_engine.task_runner import InfluenceTaskRunner

    config = verl_config(paths, run, attempt.number, None)
    config.actor_rollout_ref.model.external_lib = ROLLOUT_ALONE
    try:
        run_ppo(config, InfluenceTaskRunner)
    finally:
        ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
