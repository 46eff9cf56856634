"""The README's section on clusters can be followed as it is printed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from launcher.group import run as run_launcher
from launcher.image import ImageReference
from launcher.launcher_yaml import read_clusters
from launcher.spec import resolve_run

SECTION = (Path(__file__).resolve().parents[2] / "README.md").read_text().partition("## On a cluster")[2]
SECTION = SECTION.partition("\n## ")[0]
CODE = "\n".join(line[4:] for line in SECTION.split("\n") if line.startswith("    "))
PROFILES = CODE[CODE.index("clusters:") : CODE.index("launcher ")]
COMMANDS = [shlex.split(line, comments=True) for line in CODE.split("\n") if line.startswith("launcher ")]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "launcher.yaml"
    path.write_text(PROFILES)
    return path


def test_the_profiles_are_valid_to_the_image(file: Path) -> None:
    for name, profile in read_clusters([file]).profiles.items():
        run = resolve_run("alltoken-2node" if name == "lab-ray" else "alltoken-timing", profile=profile)
        ImageReference.parse(run.spec["cluster"]["image"])
        assert run.spec["cluster"]["data_claim"]


def test_each_command_names_a_cluster_that_is_described(file: Path) -> None:
    described = read_clusters([file]).names
    assert len(COMMANDS) > 8
    for words in COMMANDS:
        assert words[words.index("--cluster") + 1] in described, words
        assert not {"|", ">", "<"} & set(words), words


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_command_is_one(words: list[str], file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that ask no server to their end, the others to their options."""
    monkeypatch.chdir(file.parent)
    offline = words[1] in ("presets", "render")
    assert run_launcher(words[1:] if offline else [*words[1:], "--help"]) == 0
