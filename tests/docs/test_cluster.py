"""``docs/cluster.md`` speaks of commands, states, settings and profiles that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
    (block,) = re.findall(r"(?s)```yaml\n(.*?)```", PAGE)
    file = tmp_path / "launcher.yaml"
    file.write_text(block)
    clusters = read_clusters([file])
    profiles = {name: clusters.profile(name) for name in clusters.names}
    assert {profile.backend for profile in profiles.values()} == set(BACKENDS) - {"local"}
    assert clusters.default in profiles
    for profile in profiles.values():
        PresetLibrary().resolve("alltoken-timing", site=profile.layer())


def test_every_command_exists() -> None:
    named = set(re.findall(r"(?m)(?:^ +|`)launcher ([a-z]+)", PAGE))
    assert {"submit", "status", "doctor", "image"} <= named
    assert not named - set(COMMANDS)
