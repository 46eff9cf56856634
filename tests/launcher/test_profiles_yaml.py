"""``launcher.yaml``: what it may say, what is wrong with it and where, and how its settings reach a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import LauncherError, SpecError
from launcher.group import run as run_launcher
from launcher.launcher_yaml import read_clusters
from launcher.profiles import Profile, RunaiAccess, choose_profile
from launcher.spec import resolve_run

RUNAI = "clusters: {lab: {backend: runai, runai: {url: 'https://lab.run.ai', project: team}}}\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "launcher.yaml"
    path.write_text(text)
    return path


def lab(folder: Path, text: str) -> Profile:
    return read_clusters([written(folder, text)]).profile("lab")


def refused(folder: Path, text: str) -> LauncherError:
    with pytest.raises(SpecError) as caught:
        clusters = read_clusters([written(folder, text)])
        clusters.require_default()
        for name in clusters.names:
            clusters.profile(name)
    return caught.value


def test_a_runai_profile_with_everything(tmp_path: Path) -> None:
    text = (
        "clusters: {lab: {backend: runai, runai: {url: 'https://lab.run.ai/', project: team, cluster: c1,\n"
        "  client_id_variable: LAB_ID, client_secret_variable: LAB_SECRET, ca_file: ca.pem}}}\n"
    )
    profile = lab(tmp_path, text)
    assert profile.runai == RunaiAccess(
        url="https://lab.run.ai", project="team", cluster="c1", client_id_variable="LAB_ID",
        client_secret_variable="LAB_SECRET", ca_file=tmp_path / "ca.pem",  # noqa: S106 - a variable's name
    )  # fmt: skip
    assert profile.namespace == "runai-team"
    assert profile.settings == {"cluster": {"namespace": "runai-team"}}


def test_the_namespace_of_a_runai_project_can_be_another(tmp_path: Path) -> None:
    text = RUNAI.replace("}}}", "}, cluster: {namespace: other}}}")
    profile = lab(tmp_path, text)
    assert profile.namespace == "other"


def test_an_empty_file_describes_nothing(tmp_path: Path) -> None:
    clusters = read_clusters([written(tmp_path, "# nothing yet\n")])
    assert (clusters.default, clusters.names) == (None, [])


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("- a\n", "launcher.yaml:1", "must be a mapping"),
        ("clusters:\n  lab:\n", "launcher.yaml:2: clusters.lab", "must be a mapping"),
        ("clusters:\n  lab: {}\n", "launcher.yaml:2: clusters.lab.backend", "missing"),
        (
            "clusters:\n  lab: {backend: slurm}\n",
            "launcher.yaml:2: clusters.lab.backend",
            "must be kubernetes",
        ),
        ("clusters:\n  lab: {backend: kuberai}\n", "launcher.yaml:2: clusters.lab.backend", "did you mean"),
        (
            "clusters:\n  local: {backend: kubernetes}\n",
            "launcher.yaml:2: clusters.local",
            "means this machine",
        ),
        ("clusters:\n  Lab: {backend: kubernetes}\n", "launcher.yaml:2: clusters.Lab", "lower-case"),
        ("clusters:\n  kuberay: {backend: runai}\n", "clusters.kuberay.backend", "must be kuberay"),
        (
            "default_cluster: lba\nclusters: {lab: {backend: kuberay}}\n",
            "launcher.yaml:1",
            "did you mean lab?",
        ),
        ("cluster: {}\n", "launcher.yaml:1: cluster", "did you mean clusters?"),
        (
            "clusters:\n  lab:\n    backend: kubernetes\n    cluster:\n      clam: x\n",
            "launcher.yaml:5: clusters.lab.cluster.clam",
            "no such setting; did you mean claim?",
        ),
        (
            "clusters:\n  lab:\n    backend: kubernetes\n    hardware: {cpus: '4'}\n",
            "launcher.yaml:4: clusters.lab.hardware.cpus",
            "must be a whole number, not the text '4'",
        ),
        (
            "clusters:\n  lab:\n    backend: kubernetes\n    wandb: {mode: on}\n",
            "launcher.yaml:4: clusters.lab.wandb.mode",
            "must be online or offline or disabled",
        ),
        (
            "clusters: {lab: {backend: kubernetes, extends: base}}\n",
            "clusters.lab.extends",
            "no such setting",
        ),
        ("clusters: {lab: {backend: runai}}\n", "clusters.lab.runai", "needs its url and project"),
        (
            RUNAI.replace("backend: runai", "backend: kubernetes"),
            "clusters.lab.runai",
            "goes with backend: runai",
        ),
        (RUNAI.replace("https", "http"), "clusters.lab.runai.url", "must begin with https://"),
        (RUNAI.replace("lab.run.ai", "lab.run.ai/api"), "clusters.lab.runai.url", "must be the server alone"),
        (RUNAI.replace("https://lab.run.ai", "lab.run.ai"), "clusters.lab.runai.url", "must be a URL"),
        (RUNAI.replace("lab.run.ai", "lab.run.ai:x"), "clusters.lab.runai.url", "must be a URL"),
        (
            "clusters:\n  lab: {backend: kubernetes}\n  lab: {backend: kuberay}\n",
            "launcher.yaml:3",
            "written twice",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_line(
    tmp_path: Path, text: str, place: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(tmp_path, text)
    assert place in error.what
    assert what in error.what
    assert error.next_step == "repair the file, or read another with --config FILE"


@pytest.mark.parametrize("host", ["127.0.0.1:8443", "localhost"])
def test_plain_http_goes_to_this_machine_only(tmp_path: Path, host: str) -> None:
    profile = lab(tmp_path, RUNAI.replace("https://lab.run.ai", f"http://{host}"))
    assert profile.runai is not None
    assert profile.runai.url == f"http://{host}"


SECRET = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    "text",
    [
        f"clusters: {{lab: {{backend: kubernetes, cluster: {{environment: {{X: {SECRET}}}}}}}}}\n",
        f"clusters: {{lab: {{backend: kubernetes, context: {SECRET}}}}}\n",
        f"clusters: {{lab: {{backend: kubernetes, verl: {{trainer.token: {SECRET}}}}}}}\n",
        RUNAI.replace("lab.run.ai", "me:" + SECRET + "@lab.run.ai"),
        RUNAI.replace("project: team", f"project: team, client_secret_variable: {SECRET}"),
        RUNAI.replace("project: team", "project: team, client_secret_variable: aB3xY9" + "q" * 30),
        RUNAI.replace("project: team", "project: team, client_secret: aB3xY9" + "q" * 30),
    ],
)
def test_a_secret_is_refused_and_never_repeated(tmp_path: Path, text: str) -> None:
    error = refused(tmp_path, text)
    said = f"{error.what} {error.why} {error.next_step}"
    assert SECRET not in said
    assert "aB3xY9" not in said


def test_a_cluster_s_settings_lie_between_the_overlays_and_set(tmp_path: Path) -> None:
    text = (
        "clusters: {lab: {backend: kubernetes, hardware: {cpus: 3, memory: 7Gi}, wandb: {entity: us},\n"
        "  cluster: {image: 'registry/infl:2', node_pools: [a, b]}}}\n"
    )
    run = resolve_run("smoke", ["tiny-cpu"], ["hardware.memory=9Gi"], profile=lab(tmp_path, text))
    assert run.spec["hardware"]["cpus"] == 3  # the overlay says another number
    assert run.spec["hardware"]["memory"] == "9Gi"
    assert run.spec["hardware"]["device"] == "cpu"  # the overlay's
    assert (run.spec["wandb"]["entity"], run.spec["cluster"]["image"]) == ("us", "registry/infl:2")
    assert run.spec["cluster"]["node_pools"] == ["a", "b"]
    assert run.provenance["cluster"] == "lab"
    assert resolve_run("smoke", ["tiny-cpu"]).provenance["cluster"] == "local"


def test_a_rule_that_a_cluster_breaks_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the whole shows it: each value alone is valid."""
    monkeypatch.chdir(tmp_path)
    text = "clusters:\n  lab:\n    backend: kubernetes\n    cluster:\n      claim: null\n"
    with pytest.raises(SpecError) as caught:
        resolve_run("smoke", profile=lab(tmp_path, text))
    assert caught.value.what == (
        "launcher.yaml:5: clusters.lab.cluster.claim: must name a claim, since cluster.storage is claim"
    )


def test_a_rule_that_a_cluster_s_setting_makes_is_told_at_that_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the default, which was right without it; but at a later layer that made it wrong."""
    monkeypatch.chdir(tmp_path)
    text = "clusters:\n  lab:\n    backend: kubernetes\n    cluster:\n      scheduler: kueue\n"
    profile = lab(tmp_path, text)
    rule = "must name a queue, since cluster.scheduler is kueue"
    with pytest.raises(SpecError) as caught:
        resolve_run("smoke", profile=profile)
    assert caught.value.what == f"launcher.yaml:5: clusters.lab.cluster.scheduler: cluster.queue {rule}"
    assert str(caught.value.next_step).startswith("repair clusters.lab in launcher.yaml;")
    with pytest.raises(SpecError) as caught:
        resolve_run("smoke", sets=["cluster.queue=null"], profile=profile)
    assert caught.value.what == f"--set cluster.queue: {rule}"
    assert caught.value.next_step == "launcher presets show base"
    with pytest.raises(SpecError, match=r"^--set cluster\.scheduler: cluster\.queue must name a queue"):
        resolve_run("smoke", sets=["cluster.scheduler=kueue"])


def test_a_preset_is_shown_with_a_cluster_s_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "default_cluster: lab\nclusters: {lab: {backend: kubernetes, hardware: {cpus: 3, memory: 7Gi}}}\n"
    written(tmp_path, text)

    def shown(*words: str) -> dict[str, object]:
        assert run_launcher(["presets", "show", "smoke", "--output", "json", *words]) == 0
        hardware: dict[str, object] = json.loads(capsys.readouterr().out)["settings"]["hardware"]
        return hardware

    there = shown("--cluster", "lab", "--set", "hardware.memory=9Gi")
    assert (there["cpus"], there["memory"]) == (3, "9Gi")
    assert shown()["cpus"] != 3


def test_a_profile_made_without_a_file_is_named_itself() -> None:
    profile = Profile(name="made", backend="kubernetes", settings={"hardware": {"cpus": "x"}})
    with pytest.raises(SpecError, match=r"cluster 'made' hardware\.cpus: must be a whole number"):
        resolve_run("smoke", profile=profile)


def test_the_commands_read_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "clusters: {lab: {backend: kubernetes, cluster: {namespace: team}}}\n")
    assert run_launcher(["render", "--preset", "smoke", "--cluster", "lab"]) == 0
    assert 'namespace: "team"' in capsys.readouterr().out
    assert run_launcher(["render", "--preset", "smoke", "--backend", "kubernetes"]) == 0
    assert 'namespace: "team"' in capsys.readouterr().out
    assert run_launcher(["render", "--preset", "smoke", "--cluster", "local", "--backend", "kuberay"]) == 2
    assert "is of the backend local, not kuberay" in capsys.readouterr().err
    (tmp_path / "other.yaml").write_text("clusters: {lab: {backend: kuberay, clster: {}}}\n")
    assert run_launcher(["status", "--cluster", "lab", "--config", "other.yaml"]) == 3
    told = capsys.readouterr().err
    assert "other.yaml:1: clusters.lab.clster: no such setting; did you mean cluster?" in told


def test_only_the_cluster_that_is_used_must_be_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One half-written cluster stands in nobody else's way; a file that is no YAML, in everybody's."""
    monkeypatch.chdir(tmp_path)
    written(
        tmp_path,
        "clusters:\n  lab: {backend: kubernetes}\n  dgx: {backend: runai}\n"
        f"  leaky: {{backend: runai, context: {SECRET}}}\n  Odd: 3\n",
    )
    assert run_launcher(["status"]) == 0
    assert run_launcher(["render", "--preset", "smoke", "--cluster", "lab"]) == 0
    assert run_launcher(["render", "--preset", "smoke", "--backend", "kubernetes"]) == 0
    capsys.readouterr()
    assert run_launcher(["status", "--cluster", "dgx"]) == 3
    assert "launcher.yaml:3: clusters.dgx.runai: missing" in capsys.readouterr().err
    assert run_launcher(["status", "--cluster", "leaky"]) == 3
    assert SECRET not in "".join(capsys.readouterr())
    written(tmp_path, "clusters:\n  lab: {backend\n")
    assert run_launcher(["status"]) == 3
    told = capsys.readouterr().err
    assert "launcher.yaml:3: not valid YAML" in told
    assert "next: repair the file" in told


def test_a_default_that_is_not_there_blocks_only_who_relies_on_it(tmp_path: Path) -> None:
    config = written(tmp_path, "default_cluster: lba\nclusters: {lab: {backend: kubernetes}}\n")
    assert choose_profile("lab", config).name == "lab"
    with pytest.raises(SpecError, match="did you mean lab"):
        choose_profile(None, config)
