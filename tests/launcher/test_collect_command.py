"""``launcher collect`` as a process: exit codes, words, interruption, several at once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.results_home import Home
from tests.launcher.synthetic_run import RUN, SyntheticRun, step_arrays, tree

NPZ_1, NPZ_2 = "steps/step_000001.npz", "steps/step_000002.npz"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.fixture
def run(home: Home) -> SyntheticRun:
    return SyntheticRun.make(home.path / "runs").complete()


def test_a_complete_run_exits_0_and_says_what_was_done(home: Home, run: SyntheticRun) -> None:
    done = home.process("-m", "launcher", "collect", "--run", RUN)
    assert done.returncode == 0
    assert done.stdout.startswith(f"{RUN}: complete; 2 of 2 steps verified\n  copied 8 files (")
    assert "copied steps/step_000001.npz (" in done.stderr
    again = home.launcher("collect", "--run", RUN)
    assert "copied 0 files (0.0 kB), 8 were there already" in again.stdout
    assert again.stderr == ""


def test_damage_exits_6_and_names_file_attempt_and_reason(home: Home, run: SyntheticRun) -> None:
    npz = run.paths.step_npz(2)
    size = npz.stat().st_size
    npz.write_bytes(npz.read_bytes()[:-100])
    done = home.process("-m", "launcher", "collect", "--run", RUN)
    assert done.returncode == 6
    (row,) = [line for line in done.stdout.splitlines() if NPZ_2 in line]
    assert row.split()[:4] == ["torn", "2", "1", NPZ_2]
    assert f"{size - 100} bytes" in done.stdout
    assert "next: restore or remove what is named above at the source; then again: launcher" in done.stderr
    document = home.document("collect", "--run", RUN)
    assert document["exit_code"] == 6
    assert document["state"] == "damaged"
    assert [(f["problem"], f["file"], f["step"], f["attempt"]) for f in document["findings"]] == [
        ("torn", NPZ_2, 2, 1)
    ]


def test_an_unfinished_run_exits_6_and_many_missing_steps_are_one_line(home: Home) -> None:
    run = SyntheticRun.make(home.path / "runs", training={"total_steps": 221})
    run.commit(run.attempt(), 1)
    done = home.launcher("collect", "--run", RUN)
    assert done.returncode == 6
    rows = [line for line in done.stdout.splitlines() if line.lstrip().startswith("missing")]
    assert len(rows) == 1
    assert rows[0].split()[:3] == ["missing", "2-221", "1"]


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("infl-alltoken-timing-0212", 102, f"similar names there: {RUN}"),
        ("../runs/" + RUN, 2, "cannot be the name of a run"),
        ("Nope_", 2, "only a-z, 0-9 and '-' are allowed"),
        ("evil\x1b[31m", 2, r"\x1b"),
    ],
)
def test_a_name_without_a_run(home: Home, run: SyntheticRun, name: str, code: int, words: str) -> None:
    done = home.process("-m", "launcher", "collect", "--run", name)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "\x1b" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not (home.path / "results").exists()


def test_a_run_that_is_gone_but_was_collected_points_to_the_copy(home: Home, run: SyntheticRun) -> None:
    home.launcher("collect", "--run", RUN)
    run.paths.root_dir.rename(home.path / "gone")
    done = home.launcher("collect", "--run", RUN)
    assert done.returncode == 102
    assert f"launcher results show {RUN}" in done.stderr


def test_other_versions_links_and_the_same_folder_are_refused_in_words(home: Home, run: SyntheticRun) -> None:
    same = home.launcher("collect", "--run", RUN, "--results", str(home.path / "runs"))
    assert (same.returncode, "the same folder" in same.stderr) == (2, True)
    document = json.loads(run.paths.run_json.read_text())
    run.paths.run_json.write_text(json.dumps(document | {"schema_version": 7}))
    other = home.launcher("collect", "--run", RUN)
    assert (other.returncode, "schema version 7" in other.stderr) == (3, True)
    run.paths.run_json.write_text(json.dumps(document)[:-20])
    torn = home.launcher("collect", "--run", RUN)
    assert (torn.returncode, "run.json" in torn.stderr) == (6, True)
    run.paths.root_dir.rename(home.path / "elsewhere")
    run.paths.root_dir.symlink_to(home.path / "elsewhere")
    link = home.launcher("collect", "--run", RUN)
    assert (link.returncode, "symbolic link" in link.stderr) == (6, True)
    assert not home.copy.exists()


def test_another_run_of_the_name_exits_4(home: Home, run: SyntheticRun) -> None:
    home.launcher("collect", "--run", RUN)
    before = tree(home.copy)
    other = SyntheticRun.make(home.path / "other", influence={"damping": 0.5}).complete()
    done = home.launcher("collect", "--run", RUN, "--root", str(other.paths.root_dir.parent))
    assert done.returncode == 4
    assert "--results OTHER_FOLDER" in done.stderr
    assert tree(home.copy) == before


def test_a_terminal_gets_a_bar_on_standard_error_and_clean_results(home: Home, run: SyntheticRun) -> None:
    ours, theirs = os.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "collect", "--run", RUN],
        env=home.environment | {"TERM": "xterm", "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=120,
        check=False,
    )
    os.close(theirs)
    bar = os.read(ours, 100_000)
    os.close(ours)
    assert done.returncode == 0
    assert b"2 score files" in bar
    assert b"100%" in bar or b"bytes" in bar or b"kB" in bar
    assert b"\x1b" not in done.stdout
    assert b"complete" in done.stdout


_KILLED = """
import os, signal, sys
from pathlib import Path
from influence.rundir import RunPaths
from launcher.collect import collect
from launcher.ledger import Progress

class Killer(Progress):
    left = int(sys.argv[1])
    def advance(self, num_bytes):
        self.left -= num_bytes
        if self.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

collect(RunPaths.of(sys.argv[2], sys.argv[3]), Path(sys.argv[4]), Killer())
"""


@pytest.mark.parametrize("in_step", [1, 2])
def test_a_collect_killed_during_a_copy_goes_on_where_it_stopped(home: Home, in_step: int) -> None:
    run = SyntheticRun.make(home.path / "runs", training={"total_steps": 2})
    attempt = run.attempt()
    for step in (1, 2):
        run.commit(attempt, step, step_arrays(run.spec, seed=step, lengths=[20_000] * 12))
    attempt.finish(0, "done")
    after_bytes = 1 if in_step == 1 else run.paths.step_npz(1).stat().st_size + 1
    killed = home.process(
        "-c", _KILLED, str(after_bytes), str(home.path / "runs"), RUN, str(home.path / "results")
    )
    assert killed.returncode == -signal.SIGKILL
    left = set(tree(home.copy))
    assert {name for name in left if name.endswith(".part")} == {f"steps/step_00000{in_step}.npz.part"}
    assert (NPZ_1 in left) == (in_step == 2)
    assert "manifest.json" not in left
    done = home.launcher("collect", "--run", RUN, "--output", "json")
    assert done.returncode == 0
    copied = json.loads(done.stdout)["copied"]
    assert NPZ_2 in copied
    assert (NPZ_1 in copied) == (in_step == 1)
    assert "run.json" not in copied
    source = tree(run.paths.root_dir)
    collected = {name: data for name, data in tree(home.copy).items() if name != "manifest.json"}
    assert collected == {name: source[name] for name in collected}
    assert NPZ_1 in collected


def test_collects_at_once_leave_what_one_would_have_left(home: Home) -> None:
    run = SyntheticRun.make(home.path / "runs", training={"total_steps": 6})
    attempt = run.attempt()
    for step in range(1, 7):
        run.commit(attempt, step, step_arrays(run.spec, seed=step, lengths=[4000] * 12))
    attempt.finish(0, "done")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "launcher", "collect", "--run", RUN, "--output", "json"],
            env=home.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    ended = [(process.communicate(timeout=120), process.returncode) for process in processes]
    assert [code for _, code in ended] == [0] * 4, ended
    documents = [json.loads(out) for (out, _), _ in ended]
    # Each file was copied once, by one of them; all of them say the same about the copy.
    copied = sorted(file for document in documents for file in document["copied"])
    assert copied == sorted(entry["file"] for entry in documents[0]["files"])
    for document in documents:
        document.pop("copied")
    assert all(document == documents[0] for document in documents)
    listed = home.document("results", "list")
    assert [(row["run"], row["state"], row["steps"]) for row in listed] == [(RUN, "complete", 6)]


def test_a_full_disk_is_told_and_leaves_nothing_half(home: Home) -> None:
    run = SyntheticRun.make(home.path / "runs", training={"total_steps": 1})
    attempt = run.attempt()
    run.commit(attempt, 1, step_arrays(run.spec, lengths=[4000] * 12))
    attempt.finish(0, "done")
    size = run.paths.step_npz(1).stat().st_size
    limited = (
        "import resource, sys; from launcher.cli import main;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2})); main(sys.argv[1:])"
    )
    done = home.process("-c", limited, "collect", "--run", RUN)
    assert done.returncode == 6
    assert "step_000001.npz: writing failed" in done.stderr
    assert f"launcher collect --run {RUN}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [name for name in tree(home.copy) if "npz" in name]
    assert home.launcher("collect", "--run", RUN).returncode == 0


def test_hostile_names_reach_the_terminal_escaped_only(home: Home) -> None:
    run = SyntheticRun.make(home.path / "runs", training={"total_steps": 1})
    attempt = run.attempt(host="HOST")
    run.commit(attempt, 1, step_arrays(run.spec, uid="\x1b[31mred\r\n"))
    attempt.finish(1, "\x1b[31mreason\nnext line")
    record = run.paths.attempt(1)
    record.write_text(record.read_text().replace("HOST", r"\u001b]0;owned\u0007\u001b[2Jhost\u202e\ud800"))
    (run.paths.steps_dir / "evil\x1b[2J\n.npz").write_bytes(b"")
    (run.paths.steps_dir / os.fsdecode(b"latin-\xe9.npz")).write_bytes(b"")
    for args in (("collect", "--run", RUN), ("results", "show", RUN), ("results", "list")):
        for form in ((), ("--output", "json")):
            done = home.launcher(*args, *form)
            assert done.returncode in (0, 6), done.stderr
            assert "Traceback" not in done.stderr
            assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", done.stdout + done.stderr)
    assert r"evil\x1b[2J\n.npz" in home.launcher("collect", "--run", RUN).stdout
    assert r"latin-\xe9.npz" in home.launcher("collect", "--run", RUN).stdout


def test_an_index_that_cannot_be_written_does_not_fail_the_collect(home: Home, run: SyntheticRun) -> None:
    (home.path / "index.sqlite").mkdir()
    done = home.launcher("collect", "--run", RUN)
    assert done.returncode == 0
    assert "index" in done.stderr
    assert home.launcher("results", "list").returncode == 2
    (home.path / "index.sqlite").rmdir()
    assert home.launcher("results", "list").stdout.count(RUN) == 3  # with its link


@pytest.mark.parametrize("results", ["runs", f"runs/{RUN}", f"runs/{RUN}/results", "link/below"])
def test_copies_do_not_go_among_the_source(home: Home, run: SyntheticRun, results: str) -> None:
    (home.path / "link").symlink_to(run.paths.root_dir)
    before = sorted(home.path.rglob("*"))
    done = home.launcher("collect", "--run", RUN, "--results", str(home.path / results))
    assert done.returncode == 2
    assert "--results" in done.stderr
    assert sorted(home.path.rglob("*")) == before
