"""From a preset to run.json: the hash, the name, the provenance, the W&B identity."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from influence.rundir.paths import RunPaths
from influence.rundir.spec import RunSpec, create_run, read_run, spec_hash
from launcher.errors import UsageError
from launcher.git import CodeVersion
from launcher.spec import resolve_run, wandb_identity

CODE = CodeVersion(version="0.1.0", git_commit="c" * 40, dirty=False, diff_sha256=None)
DAY = date(2026, 2, 21)


def run_of(preset: str = "alltoken-timing", *args: Any, **kwargs: Any) -> RunSpec:
    return resolve_run(preset, *args, **{"code": CODE, "today": DAY, "command": ["submit"], **kwargs})


def test_the_spec_is_the_settings_with_what_they_were_made_of() -> None:
    run = run_of("alltoken-timing", ["tiny-cpu"], ["training.total_steps=3"])
    sections = {
        "model",
        "data",
        "training",
        "rollout",
        "influence",
        "store",
        "hardware",
        "retry",
        "wandb",
        "cluster",
        "verl",
    }
    assert set(run.spec) == sections | {"preset", "overlays", "code"}
    assert run.spec["preset"] == "alltoken-timing"
    assert run.spec["overlays"] == ["tiny-cpu"]
    assert run.spec["training"]["total_steps"] == 3
    assert run.spec["code"] == {
        "version": "0.1.0",
        "git_commit": "c" * 40,
        "dirty": False,
        "diff_sha256": None,
    }


def test_the_spec_survives_the_run_directory(tmp_path: Path) -> None:
    run = run_of("smoke", ["tiny-cpu"], ["model.path=Größe\u2028\U0001f600"])
    paths = RunPaths.of(tmp_path, run.run)
    assert create_run(paths, run)
    assert read_run(paths) == run
    again = run_of("smoke", ["tiny-cpu"], ["model.path=Größe\u2028\U0001f600"], command=["other"])
    assert not create_run(paths, again), "the same settings adopt the run"


def test_the_hash_covers_what_decides_the_run_and_nothing_else() -> None:
    plain = run_of()
    assert plain.spec_hash == spec_hash(plain.spec)
    for same in (
        run_of(today=date(2027, 1, 1)),
        run_of(command=["render", "--preset", "x"]),
        run_of(name="another-name"),
        run_of("alltoken-timing", (), ["training.total_steps=2"]),
        run_of("alltoken-timing", (), ["influence.damping=1e-1"]),
    ):
        assert same.spec_hash == plain.spec_hash
    for other in (
        run_of("alltoken-timing", (), ["training.seed=1"]),
        run_of("alltoken-timing", (), ["verl.trainer.test_freq=1"]),
        run_of("alltoken-timing", ["tiny-cpu"]),
        run_of(code=CodeVersion(version="0.1.0", git_commit="d" * 40, dirty=False, diff_sha256=None)),
        run_of(code=CodeVersion(version="0.1.0", git_commit="c" * 40, dirty=True, diff_sha256="e" * 64)),
        run_of("capped512-timing"),
    ):
        assert other.spec_hash != plain.spec_hash


def test_names() -> None:
    assert run_of().run == "infl-alltoken-timing-0221"
    assert run_of("alltoken-timing", ["tiny-cpu"]).run == "infl-alltoken-timing-tiny-cpu-0221"
    assert run_of(suffix="b").run == "infl-alltoken-timing-b"
    assert run_of(name="my-run").run == "my-run"
    hashed = run_of(suffix="hash")
    assert hashed.run == f"infl-alltoken-timing-{hashed.spec_hash.removeprefix('sha256:')[:4]}"
    for run in (run_of("capped512-timing", ["tiny-cpu"]), run_of(suffix="a-very-long-suffix-1")):
        assert len(run.run) <= 34


@pytest.mark.parametrize(
    ("kwargs", "what", "suggestion"),
    [
        ({"name": "My_Run"}, "'My_Run' cannot be the name of a run", "my-run"),
        ({"name": "../x"}, "'../x' cannot be the name of a run", "'x'"),
        ({"name": "a" * 35}, "it has 35 characters, at most 34", "a" * 34),
        ({"name": ""}, "it is empty", "infl-my-run"),
        ({"suffix": "Feb 21"}, "it contains", "infl-alltoken-timing-feb-21"),
        ({"suffix": "x" * 40}, "at most 34", "use a DNS label such as"),
        ({"suffix": ""}, "it ends with a hyphen", "infl-alltoken-timing"),
    ],
)
def test_names_that_no_run_can_have_come_with_one_that_it_can(
    kwargs: dict[str, str], what: str, suggestion: str
) -> None:
    with pytest.raises(UsageError) as caught:
        run_of(**kwargs)
    assert what in caught.value.what
    assert suggestion in str(caught.value.next_step)


def test_name_and_suffix_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="--name and --suffix exclude each other"):
        run_of(name="a", suffix="b")


def test_provenance_says_who_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "ada")
    monkeypatch.setenv("LOGNAME", "ada")
    run = run_of(command=["submit", "--preset", "x\udcff.yaml"])
    assert run.provenance["user"] == "ada"
    assert run.provenance["command"] == ["launcher", "submit", "--preset", "x\\xff.yaml"]
    assert run.provenance["created_at"].endswith("Z")
    json.dumps(run.to_dict()).encode()


def test_a_container_user_without_a_name_is_known_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.setattr("os.getuid", lambda: 4711)
    assert run_of().provenance["user"] == "uid-4711"


@pytest.mark.parametrize(
    ("sets", "server", "url"),
    [
        (["wandb.entity=lab"], None, "https://wandb.ai/lab/token-influence/runs/infl-smoke-0221"),
        (
            ["wandb.entity=a b&c", "wandb.project=ü"],
            None,
            "https://wandb.ai/a%20b%26c/%C3%BC/runs/infl-smoke-0221",
        ),
        (
            ["wandb.entity=lab"],
            "https://api.wandb.ai",
            "https://wandb.ai/lab/token-influence/runs/infl-smoke-0221",
        ),
        (
            ["wandb.entity=lab"],
            "https://me:pw@wandb.example.com:8080/",
            "https://wandb.example.com:8080/lab/token-influence/runs/infl-smoke-0221",
        ),
        (
            ["wandb.entity=lab", "wandb.mode=offline"],
            None,
            "https://wandb.ai/lab/token-influence/runs/infl-smoke-0221",
        ),
        (["wandb.entity=lab", "wandb.mode=disabled"], None, None),
        ([], None, None),
    ],
)
def test_the_wandb_link_is_built_where_the_entity_is_known(
    sets: list[str], server: str | None, url: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    run = run_of("smoke", (), sets)
    assert run.wandb["url"] == url
    assert run.wandb["run_id"] == run.run
    assert run.wandb == wandb_identity(run.spec["wandb"], run.run)


def test_the_entity_of_the_environment_serves_where_the_preset_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"mode": "offline", "entity": None, "project": "p"}
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    assert wandb_identity(settings, "infl-x")["url"] is None
    monkeypatch.setenv("WANDB_ENTITY", "my team")
    identity = wandb_identity(settings, "infl-x")
    assert (identity["entity"], identity["url"]) == ("my team", "https://wandb.ai/my%20team/p/runs/infl-x")
    assert wandb_identity(settings | {"entity": "ours"}, "infl-x")["entity"] == "ours"
