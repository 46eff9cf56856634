"""The Job that `launcher render` prints runs the real trainer when it is created as it stands."""

from __future__ import annotations

from pathlib import Path

import yaml

from influence.rundir import load_step
from tests.cluster.bench.bench import Bench
from tests.cluster.bench.namespace import Namespace
from tests.cluster.user import User


def test_the_real_trainer_writes_the_run_directory_into_the_claim(
    bench: Bench, namespace: Namespace, tmp_path: Path
) -> None:
    user = User.of(bench, namespace, tmp_path / "home")
    options = ("--preset", "smoke", "--overlay", "tiny-cpu", "--name", "infl-rendered")
    settings = ("--set", "training.total_steps=1", "--set", "hardware.ranks_per_node=1")
    job = yaml.safe_load(user.launcher("render", *options, *settings))
    namespace.api.create(f"{namespace.batch}/jobs", job)
    namespace.wait_for_condition("infl-rendered", "Complete", "Failed", timeout_s=600)
    paths = user.paths("infl-rendered")
    assert sum(1 for _ in load_step(paths, 1).rows()) == 8 * 4
    (pod,) = namespace.job_pods("infl-rendered")
    assert pod["status"]["phase"] == "Succeeded"
