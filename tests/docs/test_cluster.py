"""``docs/cluster.md`` speaks of commands, states, settings and profiles that exist."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from influence.rundir.exits import Verdict, classify
from launcher.backends import BACKENDS
from launcher.cli import COMMANDS
from launcher.launcher_yaml import read_clusters
from launcher.model.sections import Settings
from launcher.presets import PresetLibrary
from launcher.states import State

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "cluster.md").read_text()


def test_every_state_is_explained() -> None:
    assert re.findall(r"(?m)^\| ([A-Z]+) \|", PAGE) == [state.value for state in State]


def test_every_setting_exists() -> None:
    sections = {name: field.annotation for name, field in Settings.model_fields.items()}
    named = set(re.findall(r"`(cluster|retry|wandb|hardware)\.([a-z_]+)", PAGE))
    assert named
    for section, key in named:
        assert key in sections[section].model_fields  # type: ignore[union-attr]


def test_the_exit_codes_are_the_trainers() -> None:
    rows = re.findall(r"(?m)^\| exit ([0-9, or]+)[^|]*\| (yes|no) \| (yes|no|) *\|$", PAGE)
    costs = {
        ("no", ""): Verdict.FATAL,
        ("yes", "no"): Verdict.FREE_RETRY,
        ("yes", "yes"): Verdict.CHARGED_RETRY,
    }
    table = {
        int(code): costs[retried, charged]
        for codes, retried, charged in rows
        for code in re.findall(r"\d+", codes)
    }
    assert set(table) == {64, 65, 75, 78, 137, 143}
    assert table == {code: classify(code) for code in table}


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", PAGE))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (REPOSITORY / "docs" / link).resolve().is_file()


def test_the_profiles_are_what_the_launcher_reads(tmp_path: Path) -> None:
    blocks = re.findall(r"(?s)```yaml\n(.*?)```", PAGE)
    backends = []
    for block in blocks:
        file = tmp_path / "launcher.yaml"
        file.write_text(block)
        clusters = read_clusters([file])
        profiles = {name: clusters.profile(name) for name in clusters.names}
        backends.append({profile.backend for profile in profiles.values()})
        assert clusters.default in profiles
        for profile in profiles.values():
            PresetLibrary().resolve("alltoken-timing", site=profile.layer())
    assert backends == [{"kubernetes"}, set(BACKENDS) - {"local"}]
    assert len(blocks[0]) < len(blocks[1]) / 2, "the first one is the least that is enough"


def test_the_charts_options_are_named_and_exist() -> None:
    values = yaml.safe_load((REPOSITORY / "charts" / "influence" / "values.yaml").read_text())
    for section in ("kuberay", "kueue", "nodeViewer"):
        assert f"`{section}.enabled`" in PAGE
        assert values[section]["enabled"] is False


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_the_kubeconfig_that_is_handed_out_holds_the_launchers_token_and_nobody_elses(
    tmp_path: Path,
) -> None:
    """The page's own commands, with a token in the place of the one that a server would make."""
    (lines,) = re.findall(r"(?m)^       cluster=\$\(kubectl(?:.*\n       )+.*", PAGE)
    script = re.sub(r"\$\(kubectl --namespace research create token [^)]*\)", "made-token", lines)
    authority = base64.b64encode(b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n").decode()
    cluster = {"server": "https://lab.example:6443", "certificate-authority-data": authority}
    own = {
        "current-context": "admin",
        "contexts": [{"name": "admin", "context": {"cluster": "c", "user": "admin"}}],
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "admin", "user": {"token": "admins-token"}}],
    }
    (tmp_path / "own").write_text(yaml.safe_dump(own))
    environment = {**os.environ, "KUBECONFIG": str(tmp_path / "own"), "HOME": str(tmp_path)}
    subprocess.run(["sh", "-ec", script], cwd=tmp_path, env=environment, check=True, capture_output=True)
    text = (tmp_path / "infl.kubeconfig").read_text()
    made = yaml.safe_load(text)
    assert (made["current-context"], made["contexts"][0]["context"]["namespace"]) == ("lab", "research")
    assert made["clusters"][0]["cluster"] == cluster
    assert made["users"][0]["user"] == {"token": "made-token"}
    assert "admins-token" not in text


def test_a_contributor_is_told_which_go_the_control_plane_needs() -> None:
    script = (REPOSITORY / "scripts" / "controlplane.py").read_text()
    (version,) = re.findall(r"(?m)^MIN_GO = \((\d+), (\d+)\)", script)
    assert f"Go {'.'.join(version)} or newer" in (REPOSITORY / "CONTRIBUTING.md").read_text()


def test_every_command_exists() -> None:
    named = set(re.findall(r"(?m)(?:^ +|`)launcher ([a-z]+)", PAGE))
    assert {"submit", "status", "doctor", "image"} <= named
    assert not named - set(COMMANDS)
