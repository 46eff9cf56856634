"""Which profile a command works with, and how another command finds it again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.errors import SpecError, UsageError
from launcher.profiles import Profile, choose_profile
from launcher.site import Site
from tests.launcher.local_run import REPOSITORY

HOMELESS = {"PYTHONPATH": str(REPOSITORY), "HOME": "/nonexistent"}
PROJECT = """
default_cluster: lab
clusters:
  lab:
    {backend: kubernetes, context: there, root: mnt/runs, cluster: {namespace: team, claim: lab-claim}}
  ray: {backend: kuberay}
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a ``launcher.yaml``, and an empty configuration folder."""
    folder = tmp_path / "project"
    (folder / ".git").mkdir(parents=True)
    (folder / "launcher.yaml").write_text(PROJECT)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(folder)
    return folder


def own_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config" / "influence-launcher" / "launcher.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return path


def test_without_a_file_there_is_this_machine_and_the_current_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose_profile() == Profile(name="local", backend="local")
    assert choose_profile("kubernetes").backend == "kubernetes"
    assert choose_profile(backend="kuberay").name == "kuberay"
    with pytest.raises(UsageError, match="no cluster of that backend"):
        choose_profile(backend="runai")
    assert choose_profile(backend="runai", offline=True).backend == "runai"
    with pytest.raises(UsageError, match="no cluster 'kuberey'; did you mean kuberay") as caught:
        choose_profile("kuberey")
    assert caught.value.why == (
        "none is described; without that, local is this machine, kubernetes and kuberay the cluster of the "
        "kubeconfig's current context"
    )


def test_the_default_the_environment_and_the_option_in_that_order(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose_profile().name == "lab"
    monkeypatch.setenv("INFL_CLUSTER", "ray")
    assert choose_profile().name == "ray"
    assert choose_profile("local").name == "local"


def test_the_nearest_file_up_to_the_top_of_the_repository(project: Path, tmp_path: Path) -> None:
    below = project / "a" / "b"
    below.mkdir(parents=True)
    (tmp_path / "launcher.yaml").write_text("nonsense: true\n")  # above the repository

    def name_there() -> str:
        code = "from launcher.profiles import choose_profile; print(choose_profile().name)"
        return subprocess.run(
            [sys.executable, "-c", code], cwd=below, env=HOMELESS,
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip

    assert name_there() == "lab"
    (project / "a" / "launcher.yaml").write_text("default_cluster: kubernetes\n")
    assert name_there() == "kubernetes"
    (project / ".git").rmdir()  # no repository: the current folder's own file only
    assert name_there() == "local"


def test_the_user_s_own_file_is_laid_over_the_project_s_key_by_key(project: Path, tmp_path: Path) -> None:
    own_file(tmp_path, "clusters: {lab: {backend: kubernetes, context: mine, cluster: {claim: my-claim}}}\n")
    lab = choose_profile("lab")
    assert (lab.context, lab.namespace) == ("mine", "team")
    assert lab.settings["cluster"] == {"namespace": "team", "claim": "my-claim"}
    assert lab.root == project / "mnt" / "runs"  # relative to the file that says it


def test_a_file_that_is_named_is_read_alone(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_file(tmp_path, "nonsense: true\n")
    other = tmp_path / "other.yaml"
    other.write_text("clusters: {far: {backend: kubernetes, kubeconfig: kube/config, root: ~/runs}}\n")
    far = choose_profile("far", other)
    assert far.kubeconfig == tmp_path / "kube" / "config"
    assert far.root == Path.home() / "runs"
    assert far.options == ("--cluster", "far", "--config", str(other))
    monkeypatch.setenv("INFL_CONFIG", str(other))
    assert choose_profile("far").options == ("--cluster", "far")
    with pytest.raises(UsageError, match="no cluster 'lab'"):
        choose_profile("lab")
    with pytest.raises(UsageError, match="no such file"):
        choose_profile(config=tmp_path / "none.yaml")


def test_a_backend_finds_the_cluster_or_checks_the_one_that_is_named(project: Path) -> None:
    assert choose_profile(backend="kuberay").name == "ray"
    assert choose_profile(backend="kubernetes").name == "lab"
    assert choose_profile(backend="local").name == "local"
    with pytest.raises(UsageError, match="'lab' is of the backend kubernetes, not kuberay") as caught:
        choose_profile("lab", backend="kuberay")
    assert caught.value.next_step == (
        "leave out --backend, or choose a cluster of that backend: --cluster ray"
    )
    with pytest.raises(UsageError) as caught:
        choose_profile("lab", backend="runai")
    assert "describe a cluster with backend: runai in launcher.yaml" in str(caught.value.next_step)
    with pytest.raises(UsageError) as caught:
        choose_profile("nope")
    assert str(caught.value.why).startswith("launcher.yaml describes lab, ray; without that, local is this")
    (project / "launcher.yaml").write_text("clusters: {a: {backend: kubernetes}, b: {backend: kubernetes}}\n")
    with pytest.raises(UsageError, match="several clusters are of that backend: a, b"):
        choose_profile(backend="kubernetes")


def test_options_choose_the_same_profile_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the default is; and no more words than that needs."""
    for environment in (None, "ray", "local"):
        if environment is not None:
            monkeypatch.setenv("INFL_CLUSTER", environment)
        for name in ("lab", "ray", "local", "kubernetes"):
            options = choose_profile(name).options
            again = dict(zip(options[::2], options[1::2], strict=True)).get("--cluster")
            assert choose_profile(again).name == name
        assert choose_profile().options in ((), ("--cluster", "lab"))
    monkeypatch.delenv("INFL_CLUSTER")
    assert choose_profile().options == ()
    assert choose_profile("ray").options == ("--cluster", "ray")
    assert choose_profile("local").options == ("--cluster", "local")


def test_suggestions_name_the_cluster_and_the_root_that_was_given(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.site.open_backend", lambda profile: object())
    ray = Site.open(choose_profile("ray"))
    assert (ray.root, ray.paths("infl-x-0221")) == (None, None)
    assert ray.suggest("status", "r") == "launcher status r --cluster ray"
    assert Site.open(choose_profile()).suggest("status", "r") == "launcher status r"
    # `runs` is this machine's default folder, and no cluster's.
    here = Site.open(choose_profile("ray"), Path("runs"))
    assert here.suggest("status", "r") == "launcher status r --cluster ray --root runs"
    assert here.root == Path("runs")
    monkeypatch.setenv("INFL_ROOT", "/elsewhere")
    assert Site.open(choose_profile("ray")).root is None


def test_nothing_is_imported_where_nothing_is_described(tmp_path: Path) -> None:
    code = (
        "import sys; from launcher.profiles import choose_profile\n"
        "for name in (None, 'local', 'kubernetes'): choose_profile(name)\n"
        "print(sorted({'pydantic', 'yaml', 'kubernetes', 'httpx', 'click'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=HOMELESS,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


FOREIGN = [
    ("kubeconfig: kc", "kubeconfig"),
    ("runai: {url: 'https://evil.example.org'}", "runai.url"),
    ("runai: {client_secret_variable: GITHUB_TOKEN}", "runai.client_secret_variable"),
    ("runai: {client_id_variable: GITHUB_TOKEN}", "runai.client_id_variable"),
    ("runai: {ca_file: ca.pem}", "runai.ca_file"),
]


@pytest.mark.parametrize(("line", "key"), FOREIGN)
def test_a_projects_file_chooses_neither_programs_nor_where_secrets_go(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, key: str
) -> None:
    backend = "runai" if "runai" in line else "kubernetes"
    (project / "launcher.yaml").write_text(f"clusters:\n  far:\n    backend: {backend}\n    {line}\n")
    if backend == "runai":
        own_file(tmp_path, "clusters: {far: {runai: {project: team}}}")
    with pytest.raises(SpecError) as caught:
        choose_profile("far")
    assert f"launcher.yaml:4: clusters.far.{key}: a project's file may not" in caught.value.what
    assert str(tmp_path / "config" / "influence-launcher" / "launcher.yaml") in caught.value.what


def test_the_users_word_lets_a_projects_file_say_it(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = project / "launcher.yaml"
    path.write_text("clusters: {far: {backend: kubernetes, kubeconfig: kc}}")
    assert choose_profile("far", path).kubeconfig == project / "kc"
    monkeypatch.setenv("INFL_CONFIG", str(path))
    assert choose_profile("far").kubeconfig == project / "kc"
    monkeypatch.delenv("INFL_CONFIG")
    own = own_file(tmp_path, "clusters: {far: {kubeconfig: mine}}")
    assert choose_profile("far").kubeconfig == own.parent / "mine"  # what is overruled does no harm


def test_the_users_own_file_is_no_projects_where_they_stand_beside_it(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = own_file(tmp_path, "clusters: {far: {backend: kubernetes, kubeconfig: mine}}")
    monkeypatch.chdir(own.parent)
    assert choose_profile("far").kubeconfig == own.parent / "mine"
