"""Commands that are suggested work as they are printed, whichever way the folders were given."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launcher.group import run as run_launcher
from launcher.places import suggest
from tests.launcher.synthetic_run import RUN, SyntheticRun


def test_a_folder_is_named_only_where_it_is_not_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INFL_ROOT", raising=False)
    monkeypatch.delenv("INFL_RESULTS", raising=False)
    assert suggest("status", "r", root=Path("runs"), results=tmp_path / "results") == "launcher status r"
    assert suggest("status", root=Path("my runs")) == "launcher status --root 'my runs'"
    assert suggest("results", "show", "r", results=Path("x")) == "launcher results show r --results x"
    monkeypatch.setenv("INFL_ROOT", str(tmp_path / "my runs"))
    monkeypatch.setenv("INFL_RESULTS", "")
    assert suggest("status", root=Path("my runs")) == "launcher status"
    assert suggest("status", root=Path("runs")) == "launcher status --root runs"
    assert suggest("status", results=Path("results")) == "launcher status"


def test_following_the_suggestions_leads_from_status_to_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    SyntheticRun.make(tmp_path / "my runs").complete()
    monkeypatch.chdir(tmp_path)
    for name in ("INFL_ROOT", "INFL_RESULTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("INFL_INDEX", str(tmp_path / "index.sqlite"))

    def suggested(pattern: str, *args: str) -> list[str]:
        code = run_launcher(list(args))
        captured = capsys.readouterr()
        assert code == 0, captured.err
        (line,) = re.findall(pattern, captured.out + captured.err)
        return shlex.split(line)[1:]

    collect = suggested(r"next: +(.*)", "status", RUN, "--root", "my runs")
    show = suggested(r"Its tables: (.*)", *collect, "--results", "kept here")
    assert run_launcher(show) == 0
    assert RUN in capsys.readouterr().out


def test_a_dry_run_shows_the_spec_of_this_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("extends: smoke\ndescription: Mine.\n")
    request = ["--preset", "mine.yaml", "--overlay", "tiny-cpu", "--set", "training.seed=77"]
    assert run_launcher(["submit", *request, "--root", "r", "--name", "a", "--dry-run"]) == 0
    (line,) = re.findall(r"see the spec: (.*)", capsys.readouterr().out)
    assert run_launcher(shlex.split(line)[1:]) == 0
    assert "seed: 77" in capsys.readouterr().out
