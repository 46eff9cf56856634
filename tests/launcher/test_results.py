"""``launcher results``: what the commands print and exit with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launcher.tables import MAX_COLUMNS
from tests.launcher.results_home import Home
from tests.launcher.synthetic_run import RUN, SyntheticRun


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def collected(home: Home) -> SyntheticRun:
    run = SyntheticRun.make(home.runs).complete()
    assert home.launcher("collect", "--run", RUN).returncode == 0
    return run


def test_list_shows_a_row_and_a_link_a_run_the_latest_first(home: Home) -> None:
    for day, name in enumerate(("infl-old", "infl-new", "infl-half"), start=1):
        run = SyntheticRun.make(home.runs, name, overlays=["tiny-cpu"])
        attempt = run.attempt(started_at=f"2026-02-0{day}T09:00:00.000Z")
        run.commit(attempt, 1)
        if name != "infl-half":
            run.commit(attempt, 2)
        home.launcher("collect", "--run", name)
    done = home.launcher("results", "list")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"Results in {home.results}"
    assert lines[1].split()[:4] == ["run", "state", "steps", "positions"]
    half, new, old = (line.split() for line in lines[3:6])
    assert half[:3] == ["infl-half", "incomplete", "1/2"]
    assert new[:3] == ["infl-new", "complete", "2/2"]
    assert [old[0], *old[4:]] == ["infl-old", "3.432", "2026-02-01", "alltoken-timing", "+", "tiny-cpu"]
    assert f"  infl-new   https://wandb.ai/team/token-influence/runs/{RUN}" in lines
    assert max(map(len, lines)) <= MAX_COLUMNS


def test_list_as_json_has_numbers(home: Home, collected: SyntheticRun) -> None:
    (row,) = home.document("results", "list")
    assert (row["run"], row["steps"], row["total_steps"], row["overlays"]) == (RUN, 2, 2, [])
    assert row["dirty"] is False
    assert row["positions"] > 0
    assert "manifest_mtime_ns" not in row


def test_list_needs_no_index_and_no_collect_to_be_up_to_date(home: Home, collected: SyntheticRun) -> None:
    before = home.launcher("results", "list").stdout
    home.index.unlink()
    assert home.launcher("results", "list").stdout == before
    shutil.rmtree(home.copy)
    done = home.launcher("results", "list")
    assert (done.returncode, done.stdout) == (0, "")
    assert "nothing collected" in done.stderr
    assert home.document("results", "list") == []


def test_list_all_covers_every_folder_of_the_index(home: Home, collected: SyntheticRun) -> None:
    other = home.path / "other"
    home.launcher("collect", "--run", RUN, "--results", str(other))
    assert [row["folder"] for row in home.document("results", "list")] == [str(home.results)]
    every = [row["folder"] for row in home.document("results", "list", "--all")]
    assert every == sorted([str(other), str(home.results)])
    text = home.launcher("results", "list", "--all").stdout
    assert f"Results in {other}\n" in text
    assert f"Results in {home.results}\n" in text


def test_show_prints_every_section_within_the_terminal(home: Home, collected: SyntheticRun) -> None:
    done = home.launcher("results", "show", RUN)
    assert done.returncode == 0
    titles = [line for line in done.stdout.splitlines() if line and not line.startswith(" ")]
    assert titles == [
        RUN, "Scope", "Validation", "Score files", "Scoring time by phase", "Step time", "Code", "Attempts",
        "Links",
    ]  # fmt: skip
    # A folder's path stands on a line of its own and is as long as it is.
    folder = str(collected.paths.root_dir.parents[1])
    lines = [line for line in done.stdout.splitlines() if folder not in line]
    assert max(map(len, lines)) <= MAX_COLUMNS


def test_show_as_json_and_markdown(home: Home, collected: SyntheticRun) -> None:
    document = home.document("results", "show", RUN)
    assert {check["result"] for check in document["validation"]} == {"pass"}
    assert document["steps"][1]["timings_s"]["pop_rows"] == 3.432
    assert document["steps"][0]["scores"]["num_rows"] == 12
    assert document["wandb"]["verified"] is False
    markdown = home.launcher("results", "show", RUN, "--markdown").stdout
    assert markdown.startswith(f"## {RUN}\n\n|")
    assert "\n| hessian_solve | 1.469 | 42.8 |" in markdown


def test_show_names_what_is_missing(home: Home) -> None:
    run = SyntheticRun.make(home.runs)
    run.commit(run.attempt(), 1)
    home.launcher("collect", "--run", RUN)
    done = home.launcher("results", "show", RUN)
    assert done.returncode == 0
    assert "incomplete: 1 of 2 steps collected and verified" in done.stdout
    assert "Missing or damaged" in done.stdout
    assert "attempt 1 has not ended" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("infl-alltoken-timing-0222", 102, f"launcher results show {RUN}"),
        ("infl-nothing-like-it", 102, "launcher collect --run infl-nothing-like-it"),
        ("../results/" + RUN, 2, "cannot be the name of a run"),
    ],
)
def test_show_of_what_was_not_collected(
    home: Home, collected: SyntheticRun, name: str, code: int, words: str
) -> None:
    done = home.launcher("results", "show", name)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr


@pytest.mark.parametrize(
    "file", ["run.json", "manifest.json", "attempts/0001.json", "steps/step_000001.json"]
)
def test_show_of_a_damaged_copy_names_the_file_and_the_cure(
    home: Home, collected: SyntheticRun, file: str
) -> None:
    (home.copy / file).write_text("{")
    done = home.launcher("results", "show", RUN)
    assert done.returncode == 6
    assert file in done.stderr
    assert f"next: launcher collect --run {RUN}" in done.stderr
    home.launcher("collect", "--run", RUN)
    assert home.launcher("results", "show", RUN).returncode == 0


def test_rebuild_says_what_it_did_and_exits_6_where_a_copy_is_damaged(
    home: Home, collected: SyntheticRun
) -> None:
    home.index.unlink()
    done = home.launcher("results", "rebuild")
    assert (done.returncode, done.stdout) == (0, f"{home.index}: runs 1, results folders 1\n")
    (home.copy / "run.json").write_text("{")
    document = home.document("results", "rebuild")
    assert (document["exit_code"], document["runs"]) == (6, 0)
    assert "run.json" in document["problems"][0]["what"]
    done = home.launcher("results", "rebuild")
    assert done.returncode == 6
    assert f"next: launcher collect --run {RUN}" in done.stderr


def test_a_damaged_index_costs_one_word(home: Home, collected: SyntheticRun) -> None:
    before = home.launcher("results", "list").stdout
    home.index.write_bytes(home.index.read_bytes()[:5000])
    done = home.launcher("results", "list")
    assert (done.returncode, done.stdout) == (0, before)
    assert "made anew" in done.stderr
    assert home.launcher("results", "list").stderr == ""


_IMPORTS = """
import sys
from launcher.group import run
code = run(sys.argv[1:])
print(code, *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


@pytest.mark.parametrize("args", [("list",), ("show", RUN), ("rebuild",)])
def test_nothing_heavy_is_imported(home: Home, collected: SyntheticRun, args: tuple[str, ...]) -> None:
    done = home.process("-c", _IMPORTS, "results", *args)
    code, *modules = done.stderr.split()
    assert code == "0"
    heavy = {"numpy", "torch", "verl", "ray", "wandb", "kubernetes", "pydantic", "jinja2", "rich", "yaml"}
    assert not heavy & set(modules)


def test_every_output_is_one_json_document(home: Home, collected: SyntheticRun) -> None:
    for args in (("list",), ("show", RUN), ("rebuild",), ("show", "infl-absent")):
        json.loads(home.launcher("results", *args, "--output", "json").stdout)
