"""Stock verl with an object store for a home: killed after step 1, and gone on with from an empty disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from influence.rundir import RunPaths, list_attempts
from influence.store.objects import Objects
from influence.store.run_store import RunStore
from tests.trainer.conftest import resolve, run_document
from tests.trainer.test_end_to_end import LINGERING, processes_of, wait_until

from .conftest import RUN, stored
from .s3_server import ACCESS_KEY, SECRET_KEY
from .test_kill import assert_one_valid_record_a_step

pytestmark = pytest.mark.slow


def start(disk: Path, url: str) -> tuple[RunPaths, subprocess.Popen[bytes]]:
    paths = RunPaths.of(disk, RUN)
    disk.mkdir()
    document = run_document(RUN, resolve("alltoken-timing", "tiny-cpu"))
    environment = {"INFL_STORE_URL": url, "INFL_RUN_JSON": json.dumps(document.to_dict())}
    with (disk / "output").open("wb") as output:
        pod = subprocess.Popen(
            [sys.executable, "-m", "influence.train", "--run-dir", str(paths.root_dir)],
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    return paths, pod


def test_a_killed_run_goes_on_from_its_checkpoint_in_the_store(
    tmp_path: Path, url: str, objects: Objects, on_a_fresh_disk: Callable[[], RunStore]
) -> None:
    first, pod = start(tmp_path / "first", url)
    try:

        def has_checkpoint() -> bool:
            assert pod.poll() is None, (tmp_path / "first" / "output").read_text()[-4000:]
            return any(
                e.key == "checkpoints/attempt-0001/step_000001.json" for e in objects.list("checkpoints")
            )

        wait_until(has_checkpoint, "the checkpoint of step 1")
        pod.kill()
        assert pod.wait() == -signal.SIGKILL
        wait_until(lambda: set(processes_of(first)) <= LINGERING, "Ray's processes to end", 60)
        before = {key: data for key, data in stored(objects).items() if key.startswith("steps/step_")}
        assert sorted(before) == ["steps/step_000001.json", "steps/step_000001.npz"]

        second, pod = start(tmp_path / "second", url)
        assert pod.wait(timeout=600) == 0, (tmp_path / "second" / "output").read_text()[-4000:]
    finally:
        pod.kill()
        pod.wait()
    assert [attempt.resumed_from for attempt in list_attempts(second)] == [0, 1]
    assert not second.step_npz(1).exists()  # nothing needed it here
    after = stored(objects)
    assert {key: after[key] for key in before} == before
    records = assert_one_valid_record_a_step(on_a_fresh_disk())
    assert {step: record.attempt for step, record in records.items()} == {1: 1, 2: 2}
    assert [tuple(segment) for segment in records[2].lineage] == [(1, 1, 1), (2, 2, 2)]
    assert {"logs/attempt-0002.log", "metrics/attempt-0002.jsonl"} <= set(after)
    for secret in (SECRET_KEY, ACCESS_KEY):
        assert not [key for key, data in after.items() if secret.encode() in data]
