"""``python -m influence.train`` as a process, up to the point where verl would start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from influence.rundir import RunPaths, StepArrays, StepWriter, claim_attempt, list_attempts, read_run
from tests.trainer.conftest import Spec, resolve, run_document


def train(run_dir: Path | str, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "influence.train", "--run-dir", str(run_dir), *args],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def own_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    lines = done.stderr.splitlines() + done.stdout.splitlines()
    return [line for line in lines if not line.startswith("import time:")]


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    times = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip() for line in times}


def commit(paths: RunPaths, *steps: int) -> None:
    writer = StepWriter(paths, claim_attempt(paths).number, read_run(paths).spec_hash, store={"columns": []})
    arrays = StepArrays(
        row_offsets=np.array([0, 1]),
        scores=np.array([0.5], np.float32),
        row_id=np.array([0]),
        prompt_index=np.array([0]),
        session_id=np.array([0]),
        uid=["a"],
        reward=np.array([1.0], np.float32),
        accepted=np.array([True]),
        scored=np.array([True]),
        group_id=np.array([0]),
        response_length=np.array([1]),
    )
    for step in steps:
        writer.commit(step, arrays, timings={}, metrics={})


def test_a_finished_run_exits_0_and_imports_nothing_heavy(
    make_run: Callable[..., RunPaths], tiny_spec: Spec
) -> None:
    paths = make_run(tiny_spec)
    commit(paths, 1, 2)
    before = sorted(paths.attempts_dir.iterdir())
    done = train(paths.root_dir)
    assert done.returncode == 0, done.stderr
    assert own_lines(done) == ["infl-test-0001: all 2 steps are committed, nothing to do"]
    assert sorted(paths.attempts_dir.iterdir()) == before  # no attempt is claimed
    modules = imported(done)
    assert "influence.train.parent" in modules
    assert not modules & {"torch", "numpy", "verl", "ray", "transformers", "yaml"}


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", ">&- 2>&- <&-", "2>/dev/full"])
def test_the_exit_code_does_not_depend_on_who_listens(
    make_run: Callable[..., RunPaths], tiny_spec: Spec, redirection: str
) -> None:
    paths = make_run(tiny_spec)
    commit(paths, 1, 2)
    tiny_spec["hardware"]["cpus"] = 4096  # an attempt that preflight ends
    refused = make_run(tiny_spec, "infl-refused-0001")
    absent = RunPaths.of(paths.root_dir.parent, "infl-absent-0001")
    for run_dir, code in ((paths.root_dir, 0), (refused.root_dir, 78), (absent.root_dir, 65)):
        done = subprocess.run(
            ["bash", "-c", f'"$0" -m influence.train --run-dir "$1" {redirection}', sys.executable, run_dir],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
    assert "hardware.cpus is 4096" in refused.log(1).read_text()


def test_a_document_with_half_a_surrogate_pair_is_refused(tmp_path: Path, tiny_spec: Spec) -> None:
    document = run_document("infl-pod-0001", tiny_spec).to_dict()
    document["provenance"] = {"user": "\ud800"}
    done = train(tmp_path / "infl-pod-0001", INFL_RUN_JSON=json.dumps(document))
    assert done.returncode == 65
    (line,) = own_lines(done)
    assert "could not have been written" in line
    assert not (tmp_path / "infl-pod-0001").exists()


def test_what_stops_the_trainer_costs_no_torch_and_is_recorded(
    make_run: Callable[..., RunPaths], tiny_spec: Spec
) -> None:
    tiny_spec["hardware"]["cpus"] = 4096
    paths = make_run(tiny_spec)
    done = train(paths.root_dir)
    assert done.returncode == 78
    assert "hardware.cpus is 4096" in "\n".join(own_lines(done))
    assert "Traceback" not in done.stderr
    assert not imported(done) & {"torch", "verl", "ray"}
    (attempt,) = list_attempts(paths)
    assert attempt.exit_code == 78
    assert "hardware.cpus is 4096" in (attempt.reason or "")
    assert "hardware.cpus is 4096" in paths.log(1).read_text()


def test_the_run_is_made_from_the_environment_once(tmp_path: Path) -> None:
    spec = resolve("smoke", "tiny-cpu", hardware__cpus=4096)  # so that it goes no further
    document = json.dumps(run_document("infl-pod-0001", spec).to_dict())
    paths = RunPaths.of(tmp_path, "infl-pod-0001")
    assert train(paths.root_dir, INFL_RUN_JSON=document).returncode == 78
    written = paths.run_json.read_bytes()
    assert read_run(paths).spec == spec
    assert train(paths.root_dir, INFL_RUN_JSON=document).returncode == 78
    assert paths.run_json.read_bytes() == written
    assert [attempt.number for attempt in list_attempts(paths)] == [1, 2]

    other = resolve("smoke", "tiny-cpu", hardware__cpus=4096, influence__damping=0.5)
    done = train(paths.root_dir, INFL_RUN_JSON=json.dumps(run_document("infl-pod-0001", other).to_dict()))
    assert done.returncode == 78
    assert "influence.damping: 0.1 -> 0.5" in "\n".join(own_lines(done))
    assert paths.run_json.read_bytes() == written
    assert len(list_attempts(paths)) == 2


def test_a_document_of_another_run_is_refused(tmp_path: Path, tiny_spec: Spec) -> None:
    document = json.dumps(run_document("infl-other-0001", tiny_spec).to_dict())
    done = train(tmp_path / "infl-pod-0001", INFL_RUN_JSON=document)
    assert done.returncode == 64
    assert "'infl-other-0001'" in own_lines(done)[0]
    assert not (tmp_path / "infl-pod-0001").exists()


def test_a_document_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    done = train(tmp_path / "infl-pod-0001", INFL_RUN_JSON="[" * 60_000)
    assert done.returncode == 64
    assert "is not valid JSON" in own_lines(done)[0]


@pytest.mark.parametrize(
    ("name", "args", "environment", "code", "expected"),
    [
        ("infl-absent-0001", [], {}, 65, "is not a run"),
        ("Not_A_Name", [], {}, 64, "Not_A_Name"),
        ("infl-absent-0001", ["--bogus"], {}, 64, "--bogus"),
        ("infl-absent-0001", [], {"INFL_RUN_JSON": "{"}, 64, "not valid JSON"),
        ("infl-absent-0001", [], {"INFL_RUN_JSON": '{"schema_version": 99}'}, 65, "schema version 99"),
    ],
)
def test_wrong_usage_and_unusable_runs(
    tmp_path: Path, name: str, args: list[str], environment: dict[str, str], code: int, expected: str
) -> None:
    done = train(tmp_path / name, *args, **environment)
    (line,) = own_lines(done)
    assert done.returncode == code, line
    assert line.startswith("influence.train: ")
    assert expected in line


def test_a_spec_without_a_number_of_steps_is_refused(
    make_run: Callable[..., RunPaths], tiny_spec: Spec
) -> None:
    tiny_spec["training"]["total_steps"] = 0  # or every run would be finished
    done = train(make_run(tiny_spec).root_dir)
    assert done.returncode == 78
    assert "total_steps is 0" in own_lines(done)[0]
