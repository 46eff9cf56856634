"""The stop that a pod's hook asks for reaches the run's trainer, and nobody else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from influence.train import stop

# Takes the arguments of the trainer, so that its command line is the trainer's; ends a moment after SIGTERM.
TRAINER = """
import signal, sys, time
def stop(number, frame):
    time.sleep(0.3)
    print("stopped", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)
"""


def start(folder: Path, run_dir: str) -> subprocess.Popen[str]:
    package = folder / "influence" / "train"
    package.mkdir(parents=True, exist_ok=True)
    for place in (folder / "influence" / "__init__.py", package / "__init__.py"):
        place.touch()
    (package / "__main__.py").write_text(TRAINER)
    trainer = subprocess.Popen(
        [sys.executable, "-m", "influence.train", "--run-dir", run_dir],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "ready\n"
    return trainer


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    trainers = [start(tmp_path, str(tmp_path / name)) for name in ("infl-a", "infl-a-r2")]
    yield trainers
    for trainer in trainers:
        trainer.kill()
        trainer.communicate()


def test_the_trainer_of_the_run_is_stopped_and_waited_for(
    two: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    ours, other = two
    done = subprocess.run(
        [sys.executable, "-m", "influence.train.stop", "--run-dir", str(tmp_path / "infl-a")],
        check=False,
        timeout=20,
    )
    assert done.returncode == 0
    assert ours.wait(timeout=5) == 75
    assert ours.stdout is not None
    assert ours.stdout.read() == "stopped\n", "it had the time that it took"
    assert other.poll() is None


def test_where_there_is_no_trainer_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    assert stop.main(["--run-dir", str(tmp_path / "infl-a")]) == 0
