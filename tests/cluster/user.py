"""A user of the launcher with a cluster: a home, a launcher.yaml, and commands in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from influence.rundir import RunPaths
from tests.cluster.bench.bench import Bench
from tests.cluster.bench.namespace import Namespace
from tests.cluster.bench.waiting import until

CHECKOUT = Path(__file__).parents[2]
CLAIM = "infl-artifacts"
TIMEOUT_S = 300.0


def install(folder: Path) -> Path:
    """The launcher as a wheel lays it out: no checkout, so what git says about this one plays no part."""
    for package in ("launcher", "influence"):
        shutil.copytree(CHECKOUT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for data in ("jobs", "templates"):
        shutil.copytree(CHECKOUT / data, folder / "launcher" / "_data" / data)
    return folder


@dataclass(frozen=True)
class User:
    """Works in ``home`` on the cluster ``lab``, whose claim this machine mounts at ``root``."""

    home: Path
    namespace: Namespace
    root: Path
    packages: Path

    @classmethod
    def of(cls, bench: Bench, namespace: Namespace, home: Path, packages: Path) -> User:
        """Prepares the namespace as the chart does: the trainer's service account and the claim."""
        home.mkdir(exist_ok=True)
        namespace.create_service_account("infl-trainer")
        user = cls(home, namespace, namespace.create_claim(CLAIM), packages)
        user.describe_cluster(bench.kubeconfig)
        return user

    def describe_cluster(self, kubeconfig: Path, **more: Any) -> None:
        """Writes launcher.yaml anew; ``more`` adds to the profile, None takes away."""
        section = {"namespace": self.namespace.name, "claim": CLAIM, **more.pop("cluster", {})}
        profile = {"backend": "kubernetes", "kubeconfig": str(kubeconfig), "root": str(self.root)} | more
        profile = {key: value for key, value in profile.items() if value is not None}
        document = {"clusters": {"lab": {**profile, "cluster": section}}}
        (self.home / "launcher.yaml").write_text(yaml.safe_dump(document))

    @property
    def environment(self) -> dict[str, str]:
        """Of the user's commands."""
        hidden = ("KUBECONFIG", "PYTHONPATH")
        inherited = {name: value for name, value in os.environ.items() if name not in hidden}
        return inherited | {
            "HOME": str(self.home),
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "INFL_CONFIG": str(self.home / "launcher.yaml"),
            "INFL_CLUSTER": "lab",
            "INFL_RESULTS": str(self.home / "results"),
            "INFL_INDEX": str(self.home / "index.sqlite"),
            "PYTHONPATH": str(self.packages),
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A command of the launcher, its standard output and error in one pipe each."""
        return subprocess.Popen(
            [sys.executable, "-m", "launcher", *words],
            cwd=self.home,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def launcher(self, *words: str, code: int = 0) -> str:
        """What a command prints; its exit code must be ``code``."""
        output, errors = self.ended(self.start(*words), code)
        return output if code == 0 else output + errors

    def ended(self, process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
        """Standard output and error of a command that was started, once it has ended."""
        output, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == code, f"{process.args}: {process.returncode}\n{output}\n{errors}"
        return output, errors

    def document(self, *words: str, code: int = 0) -> Any:
        """What a command prints with ``--output json``."""
        output, _ = self.ended(self.start(*words, "--output", "json"), code)
        return json.loads(output)

    def submit(self, run: str, image: str, *words: str, code: int = 0) -> str:
        """A run of two steps on eight GPUs, with two charged retries."""
        return self.launcher(*self.submit_words(run, image), *words, code=code)

    def submit_words(self, run: str, image: str) -> tuple[str, ...]:
        settings = {
            "cluster.image": image,
            "training.total_steps": "2",
            "wandb.mode": "disabled",
            "retry.backoff_limit": "2",
            "retry.grace_period_s": "5",
        }
        sets = [word for path, value in settings.items() for word in ("--set", f"{path}={value}")]
        return ("submit", "--preset", "smoke", "--name", run, *sets)

    def status(self, run: str) -> Any:
        return self.document("status", run)

    def wait_for_state(self, run: str, *states: str, timeout_s: float = 60.0) -> Any:
        """The status document, once the state is one of these."""

        def reached() -> Any:
            status = self.status(run)
            return status if status["state"] in states else None

        return until(reached, f"run {run} {' or '.join(states)}", timeout_s=timeout_s, every_s=0.2)

    def wait_for_reason(self, run: str, words: str) -> Any:
        """The status document, once its reason contains these words."""

        def told() -> Any:
            status = self.status(run)
            return status if words in status["reason"] else None

        return until(told, f"run {run}: {words}", every_s=0.2)

    def wait_for_attempt(self, run: str, number: int, words: str) -> None:
        """Until an attempt has these words in its log: it is where a fault shall meet it."""
        log = self.paths(run).log(number)
        until(lambda: log.exists() and words in log.read_text(), f"{words!r} in {log}")

    def paths(self, run: str) -> RunPaths:
        return RunPaths.of(self.root, run)
