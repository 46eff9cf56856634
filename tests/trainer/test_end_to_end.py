"""Stock verl, real Ray, two ranks on the CPU: one run that is stopped, killed, and finished all the same.

Attempt 1 gets SIGTERM after step 1; attempt 2 resumes from its checkpoint and is killed in step 2; attempt 3
finds the checkpoints gone and computes both steps from scratch.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from influence.rundir import (
    RunPaths,
    committed_steps,
    create_run,
    list_attempts,
    load_step,
    missing_steps,
    read_metrics,
    verify_step,
)
from tests.trainer.conftest import resolve, run_document

pytestmark = pytest.mark.slow

TIMEOUT_S = 600

# Children of Ray's daemon. When it is killed they report that first, to a server that is gone too, and end a
# minute later; a supervisor ends them sooner, by the run's mark in their environment.
LINGERING = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def processes_of(paths: RunPaths) -> list[str]:
    """Command lines of the processes whose environment names the run."""
    marker = f"INFL_RUN_DIR={paths.root_dir.resolve()}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker in (entry / "environ").read_bytes().split(b"\0"):
                    found.append((entry / "cmdline").read_text().replace("\0", " ").strip())
            except OSError:
                continue
    return [command for command in found if command]


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"waited in vain for {what}"
        time.sleep(0.05)


@dataclass
class History:
    """What was seen while the run went on."""

    paths: RunPaths
    exit_codes: list[int] = field(default_factory=list)
    left_running: list[list[str]] = field(default_factory=list)
    step_1: dict[str, str] = field(default_factory=dict)
    output: list[str] = field(default_factory=list)

    def start(self) -> subprocess.Popen[str]:
        """A start of the trainer, its output in a file as a supervisor would have it."""
        self._stdout = (self.paths.root_dir.parent / f"stdout-{len(self.exit_codes)}").open("w+")
        return subprocess.Popen(
            [sys.executable, "-m", "influence.train", "--run-dir", str(self.paths.root_dir)],
            stdout=self._stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until(self, trainer: subprocess.Popen[str], condition: Callable[[], bool], what: str) -> None:
        def ready() -> bool:
            assert trainer.poll() is None, self.paths.log(len(self.exit_codes) + 1).read_text()[-4000:]
            return condition()

        wait_until(ready, what)

    def end(self, trainer: subprocess.Popen[str]) -> None:
        code = trainer.wait(timeout=TIMEOUT_S)
        self.exit_codes.append(code)
        if code < 0:
            wait_until(lambda: set(processes_of(self.paths)) <= LINGERING, "Ray's processes to end", 60)
        else:
            self.left_running.append([p for p in processes_of(self.paths) if p not in LINGERING])
        self._stdout.seek(0)
        self.output.append(self._stdout.read())
        self._stdout.close()


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    paths = RunPaths.of(tmp_path_factory.mktemp("runs"), "infl-retries-0001")
    create_run(paths, run_document(paths.name, resolve("alltoken-timing", "tiny-cpu")))
    history = History(paths)
    tracker = paths.checkpoints_dir / "latest_checkpointed_iteration.txt"

    trainer = history.start()
    try:
        history.until(trainer, lambda: tracker.exists() and tracker.read_text() == "1", "checkpoint 1")
        history.step_1 = {path.name: digest(path) for path in (paths.step_npz(1), paths.step_record(1))}
        assert not paths.step_record(2).exists()
        trainer.send_signal(signal.SIGTERM)
        history.end(trainer)

        trainer = history.start()
        # It has loaded the checkpoint, so step 2 comes next; nothing of it is committed for seconds.
        history.until(trainer, lambda: list_attempts(paths)[-1].resumed_from == 1, "the resume")
        time.sleep(1)
        assert not paths.step_record(2).exists()
        trainer.kill()
        history.end(trainer)

        paths.checkpoints_dir.rename(paths.root_dir / "lost")
        trainer = history.start()
        history.end(trainer)
    finally:
        trainer.kill()
        trainer.wait()
    return history


def test_each_attempt_ends_with_the_code_that_a_supervisor_acts_on(history: History) -> None:
    assert history.exit_codes == [75, -signal.SIGKILL, 0], history.output[-1][-4000:]
    first, second, third = list_attempts(history.paths)
    assert (first.exit_code, first.reason) == (75, "stopped by SIGTERM")
    assert second.is_open  # it could not say
    assert (third.exit_code, third.reason) == (0, "all steps committed (0)")
    assert [first.resumed_from, second.resumed_from, third.resumed_from] == [0, 1, 0]


def test_no_process_survives_a_stop_or_the_end(history: History) -> None:
    assert history.left_running == [[], []]


def test_what_step_1_committed_first_keeps_its_bytes(history: History) -> None:
    paths = history.paths
    assert {name: digest(paths.steps_dir / name) for name in history.step_1} == history.step_1
    assert missing_steps(paths, 2) == []
    for record in committed_steps(paths).values():
        assert verify_step(paths, record).status == "ok"


def test_a_step_that_is_computed_again_has_the_same_bytes(history: History) -> None:
    """Same tokens, same gradients, same scores, although the first attempt was another process."""
    replay = load_step(history.paths.root_dir, 1).record
    assert (replay.attempt, replay.replay, replay.equal) == (3, True, True)
    assert replay.sha256 == history.step_1["step_000001.npz"]
    assert not history.paths.replay_npz(3, 1).exists()


def test_every_response_token_has_a_finite_score(history: History) -> None:
    spec = json.loads(history.paths.run_json.read_text())["spec"]["training"]
    num_rows = spec["prompts_per_step"] * spec["responses_per_prompt"]
    for step in (1, 2):
        arrays = load_step(history.paths.root_dir, step).arrays
        assert arrays.num_rows == num_rows
        assert np.diff(arrays.row_offsets).tolist() == arrays.response_length.tolist()
        assert np.isfinite(arrays.scores).all()
        assert len(set(arrays.response_length.tolist())) > 1
        assert arrays.row_id.tolist() == list(range(num_rows))
        assert sorted(set(arrays.session_id.tolist())) == list(range(spec["responses_per_prompt"]))


def test_most_groups_have_contrast_and_scores_that_are_not_zero(history: History) -> None:
    for step in (1, 2):
        arrays = load_step(history.paths.root_dir, step).arrays
        groups = {group: arrays.accepted[arrays.group_id == group] for group in set(arrays.group_id.tolist())}
        mixed = {group for group, accepted in groups.items() if 0 < accepted.sum() < len(accepted)}
        assert len(mixed) > len(groups) / 2
        for r in range(arrays.num_rows):
            scores = arrays.scores[arrays.row_offsets[r] : arrays.row_offsets[r + 1]]
            assert arrays.scored[r] == (int(arrays.group_id[r]) in mixed)
            assert bool(np.any(scores != 0)) == arrays.scored[r]


def test_verls_metrics_carry_the_tracers(history: History) -> None:
    metrics = read_metrics(history.paths, 3)
    assert sorted(metrics) == [1, 2]
    for step, values in metrics.items():
        record = load_step(history.paths.root_dir, step).record
        assert values["influence_trace/rows_emitted"] == record.rows
        assert values["influence_trace/captured_tokens"] == record.positions
        for phase in ("capture", "pop_rows", "grad_staging", "forward_1", "logprob_backward"):
            assert values[f"timing_s/influence_{phase}"] == pytest.approx(record.timings[phase])
        assert not [name for name in values if name.startswith("actor/influence")]
        assert math.isfinite(values["actor/grad_norm"])
        # One update a step, with old log-probabilities of the policy itself: no extra pass.
        assert values["influence_trace/fused_fraction"] == values["influence_trace/on_policy_fraction"] == 1
        assert values["timing_s/influence_forward_1"] == 0
        # The policy that generated is the policy that is traced.
        assert values["training/rollout_probs_diff_max"] < 1e-4


def test_the_log_is_what_was_printed(history: History) -> None:
    log = history.paths.log(3).read_text()
    assert log == history.output[2]
    assert "influence.train: all steps committed (0)" in log


def test_wandb_has_one_run_for_all_attempts(history: History) -> None:
    folders = list((history.paths.root_dir / "wandb").glob("offline-run-*"))
    assert folders
    assert all(folder.name.endswith("infl-retries-0001") for folder in folders)


def test_another_start_ends_at_once(history: History) -> None:
    before = sorted(history.paths.attempts_dir.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "influence.train", "--run-dir", str(history.paths.root_dir)],
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "nothing to do" in done.stdout
    modules = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "influence.train.parent" in modules
    assert not modules & {"torch", "numpy", "verl", "ray"}
    assert sorted(history.paths.attempts_dir.iterdir()) == before
