"""The main job as a user runs it: submit, lose the trainer during step 2, be retried, collect, read.

Stock verl, real Ray, two ranks on the CPU, and the launcher's own commands in processes of their own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from influence.rundir import RunPaths, list_attempts, load_step, read_metrics

pytestmark = pytest.mark.slow

RUN = "infl-e2e"
TIMEOUT_S = 900
OPTIONS = ("--preset", "alltoken-timing", "--overlay", "tiny-cpu", "--name", RUN)


@dataclass(frozen=True)
class World:
    """One user's folders, and the launcher run in them."""

    home: Path

    @property
    def paths(self) -> RunPaths:
        return RunPaths.of(self.home / "runs", RUN)

    def launcher(self, *args: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *args],
            env={
                **os.environ,
                "INFL_ROOT": str(self.home / "runs"),
                "INFL_RESULTS": str(self.home / "results"),
                "INFL_INDEX": str(self.home / "index.sqlite"),
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def document(self, *args: str, code: int = 0) -> Any:
        return json.loads(self.launcher(*args, "--output", "json", code=code))


def processes_of(run_dir: Path) -> list[int]:
    """Every process whose environment names this run directory."""
    marker = f"INFL_RUN_DIR={run_dir}".encode()
    found = []
    for proc in Path("/proc").iterdir():
        if proc.name.isdigit():
            try:
                if marker in (proc / "environ").read_bytes().split(b"\0"):
                    found.append(int(proc.name))
            except OSError:
                continue
    return found


def trainer_parent(run_dir: Path) -> int:
    """The process that the supervisor started: `python -m influence.train`."""
    for pid in processes_of(run_dir):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"influence.train" in words:
            return pid
    raise AssertionError("no trainer runs")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def wait_until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def killed_and_retried(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, dict[str, str]]:
    """The run after its trainer was SIGKILLed during step 2; with the digests that step 1 had before."""
    world = World(tmp_path_factory.mktemp("user"))
    paths = world.paths
    submitted = world.document("submit", *OPTIONS)
    assert submitted["run"] == RUN
    try:
        # verl logs a step's metrics when all of it is done, its checkpoint included.
        wait_until(
            lambda: 1 in (read_metrics(paths, 1) if paths.metrics(1).exists() else {}), "the end of step 1"
        )
        assert not paths.step_record(2).exists()
        before = {path.name: digest(path) for path in (paths.step_npz(1), paths.step_record(1))}
        os.kill(trainer_parent(paths.root_dir), signal.SIGKILL)
        world.launcher("status", RUN, "--wait", "--timeout", str(TIMEOUT_S))
    except BaseException:
        world.launcher("cancel", RUN)
        raise
    return world, before


def test_the_run_finishes_and_step_1_keeps_its_bytes(
    killed_and_retried: tuple[World, dict[str, str]],
) -> None:
    world, before = killed_and_retried
    paths = world.paths
    assert {name: digest(paths.steps_dir / name) for name in before} == before
    assert paths.committed_step_numbers() == [1, 2]
    status = world.document("status", RUN)
    assert status["state"] == "SUCCEEDED"
    assert [attempt.number for attempt in list_attempts(paths)] == [1, 2]
    first, second = list_attempts(paths)
    assert first.is_open  # killed too hard to say how it ended
    assert (second.exit_code, second.resumed_from) == (0, 1)


def test_nothing_of_the_run_is_left_running(killed_and_retried: tuple[World, dict[str, str]]) -> None:
    world, _ = killed_and_retried
    wait_until(lambda: not processes_of(world.paths.root_dir), "the last process to end")


def test_the_supervisor_recorded_why_it_retried(killed_and_retried: tuple[World, dict[str, str]]) -> None:
    world, _ = killed_and_retried
    text = world.paths.events_jsonl.read_text()
    assert "SIGKILL" in text


def test_every_response_token_has_a_finite_score_and_most_groups_have_contrast(
    killed_and_retried: tuple[World, dict[str, str]],
) -> None:
    world, _ = killed_and_retried
    spec = json.loads(world.paths.run_json.read_text())["spec"]
    num_responses = spec["training"]["prompts_per_step"] * spec["training"]["responses_per_prompt"]
    for step in (1, 2):
        view = load_step(world.paths.root_dir, step)
        arrays = view.arrays
        assert len(arrays.row_offsets) == num_responses + 1
        assert np.array_equal(np.diff(arrays.row_offsets), arrays.response_length)
        assert np.isfinite(arrays.scores).all()
        assert len(np.unique(arrays.group_id)) == spec["training"]["prompts_per_step"]
        assert arrays.scored.mean() > 0.5
        assert (np.abs(arrays.scores) > 0).mean() > 0.4
        # A group is scored exactly where it has accepted and rejected responses.
        for group in np.unique(arrays.group_id):
            members = arrays.group_id == group
            accepted = arrays.accepted[members]
            assert arrays.scored[members].all() == (accepted.any() and not accepted.all())
        assert np.array_equal(arrays.accepted, arrays.reward > spec["influence"]["accepted_above"])
        # log-probs belong to sampled tokens: none is impossible or certain beyond rounding.
        assert (arrays.log_probs <= 0).all()
        assert (arrays.log_probs > -40).all()


def test_timings_sum_to_the_whole(killed_and_retried: tuple[World, dict[str, str]]) -> None:
    world, _ = killed_and_retried
    for step in (1, 2):
        timings = load_step(world.paths.root_dir, step).record.timings
        phases = ("grad_staging", "hessian_solve", "token_scoring", "score_aggregation", "other")
        assert all(timings[phase] >= 0 for phase in phases)
        assert math.isclose(sum(timings[p] for p in phases), timings["pop_rows"], rel_tol=1e-6)
        assert timings["pop_rows"] > 0


def test_metrics_reach_verl_under_their_own_names(killed_and_retried: tuple[World, dict[str, str]]) -> None:
    world, _ = killed_and_retried
    metrics = read_metrics(world.paths, 2)[2]
    arrays = load_step(world.paths.root_dir, 2).arrays
    assert metrics["influence_trace/rows_emitted"] == len(arrays.row_offsets) - 1
    assert metrics["influence_trace/captured_tokens"] == len(arrays.scores)
    groups = {int(g): bool(s) for g, s in zip(arrays.group_id, arrays.scored, strict=True)}
    assert metrics["influence_trace/skipped_groups"] == sum(not scored for scored in groups.values())
    assert metrics["timing_s/influence_pop_rows"] > 0


def test_wandb_kept_one_offline_run_id_for_both_attempts(
    killed_and_retried: tuple[World, dict[str, str]],
) -> None:
    world, _ = killed_and_retried
    names = [path.name for path in world.paths.wandb_dir.rglob("run-*.wandb")]
    assert len(names) == 2
    assert set(names) == {f"run-{RUN}.wandb"}


def test_starting_the_finished_run_again_exits_0_without_torch(
    killed_and_retried: tuple[World, dict[str, str]],
) -> None:
    world, _ = killed_and_retried
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "influence.train", "--run-dir", str(world.paths.root_dir)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "influence.rundir" in imported
    assert not {name.partition(".")[0] for name in imported} & {"torch", "verl", "ray", "numpy"}
    assert len(list_attempts(world.paths)) == 2


def test_submitting_again_adopts_and_other_settings_are_refused(
    killed_and_retried: tuple[World, dict[str, str]],
) -> None:
    world, before = killed_and_retried
    assert world.document("submit", *OPTIONS)["action"] == "complete"
    refused = world.document("submit", *OPTIONS, "--set", "influence.damping=0.2", code=4)
    assert "influence.damping: 0.1 -> 0.2" in refused["why"]
    assert digest(world.paths.step_npz(1)) == before["step_000001.npz"]


def test_collect_verifies_and_results_show_the_run(
    killed_and_retried: tuple[World, dict[str, str]],
) -> None:
    world, before = killed_and_retried
    world.launcher("collect", "--run", RUN)
    copy = world.home / "results" / RUN / "steps" / "step_000001.npz"
    assert digest(copy) == before["step_000001.npz"]
    shown = world.launcher("results", "show", RUN)
    for word in ("alltoken-timing", "tiny-cpu", "grad_staging", "hessian_solve", "pop_rows", "attempt"):
        assert word in shown, shown
    # Index and text name the same run after a rebuild from the copies alone.
    world.launcher("results", "rebuild")
    assert world.launcher("results", "show", RUN) == shown


def test_a_copy_cut_short_is_collected_anew_and_a_cut_source_is_reported(
    killed_and_retried: tuple[World, dict[str, str]], tmp_path: Path
) -> None:
    world, _ = killed_and_retried
    npz = world.paths.step_npz(2)
    whole = npz.read_bytes()
    try:
        npz.write_bytes(whole[:-100])
        done = world.launcher("collect", "--run", RUN, "--results", str(tmp_path / "fresh"), code=6)
        assert "step_000002.npz" in done
    finally:
        npz.write_bytes(whole)
    world.launcher("collect", "--run", RUN, "--results", str(tmp_path / "fresh"))
