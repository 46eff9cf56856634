"""``launcher doctor``: what is checked, what is said about failures, and the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from influence.rundir import RunSpec
from launcher.backends import local_checks
from launcher.doctor import Check, examine
from launcher.errors import BackendError
from launcher.group import run as run_launcher
from launcher.profiles import Profile
from launcher.spec import resolve_run

LOCAL = Profile(name="local", backend="local")
IMAGE = "registry.example.com/infl@sha256:" + "5" * 64
LAB = (
    "clusters: {lab: {backend: kubernetes, context: there, "
    f"cluster: {{namespace: team, data_claim: datasets, image: '{IMAGE}'}}}}}}\n"
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with nothing: no key, no file of keys, no packages that would be missing."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local_checks, "lacking_packages", list)
    return tmp_path


def named(checks: Iterator[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def install(
    monkeypatch: pytest.MonkeyPatch, *checks: Check, error: BackendError | None = None
) -> list[object]:
    """Checks for the backend kubernetes; what they were asked about is noted."""
    asked: list[object] = []

    def answer(profile: Profile, run: RunSpec | None) -> Iterator[Check]:
        asked.extend((profile, run))
        yield from checks
        if error is not None:
            raise error

    module = ModuleType("launcher.backends.kubernetes_checks")
    module.checks = answer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


# --- this machine


def test_a_key_in_the_environment_or_in_netrc(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = resolve_run("smoke", ["tiny-cpu"], ["wandb.mode=online"])

    def key(run: RunSpec | None = run) -> Check:
        return named(examine(LOCAL, run))["W&B key"]

    assert (key().outcome, key(None).outcome) == ("failed", "warning")
    assert "wandb login" in str(key().next_step)
    offline = resolve_run("smoke", ["tiny-cpu"], ["wandb.mode=offline"])
    assert key(offline).outcome == "ok"
    (home / ".netrc").write_text("machine api.wandb.ai login user password hunter2hunter2\n")
    (home / ".netrc").chmod(0o600)
    assert key().outcome == "ok"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    assert "has none for wandb.example.com" in key().detail
    (home / ".netrc").write_text("machine api.wandb.ai lgin hunter2hunter2\n")
    assert "cannot be read" in key().detail
    monkeypatch.setenv("WANDB_API_KEY", "hunter2hunter2")
    assert key().outcome == "ok"
    assert "hunter2" not in "".join(str(check) for check in examine(LOCAL, run))


def test_packages_machine_and_root(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {check.outcome for name, check in named(examine(LOCAL, None)).items() if name != "W&B key"} == {
        "ok"
    }
    run = resolve_run("smoke", ["tiny-cpu"], ["hardware.cpus=100000"])
    monkeypatch.setattr(local_checks, "lacking_packages", lambda: ["the packages verl; install them: ..."])
    (home / "file").write_text("")
    found = named(examine(Profile(name="local", backend="local", root=home / "file" / "runs"), run))
    assert "100000 CPUs" in found["machine"].detail
    assert found["trainer"].detail == "this Python lacks the packages verl"
    assert found["root"].outcome == "failed"
    assert all(check.next_step for check in found.values() if check.outcome == "failed")


# --- a cluster


def test_the_backend_s_checks_get_the_profile_and_the_run(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "launcher.yaml").write_text(LAB)
    asked = install(
        monkeypatch,
        Check(name="server", outcome="ok", detail="answers"),
        Check(name="claim infl-artifacts", outcome="warning", detail="is not bound yet", next_step="wait"),
    )
    assert run_launcher(["doctor", "--cluster", "lab", "--preset", "smoke", "--root", "mnt"]) == 0
    out = capsys.readouterr().out
    assert "cluster 'lab', kubernetes, context there, namespace team (launcher.yaml:1)" in out
    assert "warning  claim infl-artifacts  is not bound yet" in out
    assert "next: wait" in out
    assert "lab: 0 of 4 checks failed, 1 warn" in out
    profile, run = asked
    assert isinstance(profile, Profile)
    assert (profile.namespace, profile.root) == ("team", Path("mnt"))
    assert isinstance(run, RunSpec)
    assert run.spec["cluster"]["namespace"] == "team"


def test_a_failure_exits_5_and_says_what_to_do(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = Check(name="Secret infl-secrets", outcome="failed", detail="is not there", next_step="make it")
    install(monkeypatch, failure, Check(name="queue", outcome="unknown", detail="may not be listed"))
    assert run_launcher(["doctor", "--cluster", "kubernetes", "--output", "json"]) == 5
    document = json.loads(capsys.readouterr().out)
    assert (document["cluster"], document["ok"]) == ("kubernetes", False)
    assert [check["outcome"] for check in document["checks"]] == [
        "ok",
        "warning",
        "warning",
        "failed",
        "unknown",
    ]
    assert document["checks"][3]["next_step"] == "make it"
    assert run_launcher(["doctor", "--cluster", "kubernetes"]) == 5
    assert "1 of 5 checks failed, 2 warn, 1 could not be made" in capsys.readouterr().out


def test_an_image_that_can_move_and_data_without_a_claim_are_warned_of(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch)
    (home / "launcher.yaml").write_text(LAB)
    assert run_launcher(["doctor", "--cluster", "lab", "--preset", "smoke"]) == 0
    assert "lab: all 2 checks passed" in capsys.readouterr().out
    tagged = ["--set", "cluster.image=registry.example.com/infl:2", "--set", "cluster.data_claim=null"]
    assert run_launcher(["doctor", "--cluster", "lab", "--preset", "smoke", *tagged]) == 0
    out = capsys.readouterr().out
    assert "warning  image    registry.example.com/infl:2: a tag can move to another image" in out
    assert "cluster.data_claim is null, so the image itself must hold /data/train.parquet" in out
    assert "0 of 3 checks failed, 2 warn" in out


def test_without_a_preset_a_cluster_is_asked_for_what_every_preset_needs(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "launcher.yaml").write_text(LAB)
    asked = install(monkeypatch, Check(name="server", outcome="ok", detail="answers"))
    assert run_launcher(["doctor", "--cluster", "lab"]) == 0
    _, run = asked
    assert isinstance(run, RunSpec)
    assert (run.spec["preset"], run.spec["cluster"]["namespace"]) == ("base", "team")


def test_an_error_that_ends_the_checks_is_a_failure_with_its_next_step(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = BackendError("no kubeconfig", why="KUBECONFIG is not set", next_step="get one")
    install(monkeypatch, Check(name="a", outcome="ok", detail="b"), error=error)
    *_, last = examine(Profile(name="kubernetes", backend="kubernetes"), None)
    assert (last.outcome, last.next_step) == ("failed", "get one")
    assert last.detail == "no kubeconfig: KUBECONFIG is not set"


def test_options_of_a_run_need_a_preset(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_launcher(["doctor", "--overlay", "tiny-cpu"]) == 2
    assert "go with --preset" in capsys.readouterr().err
