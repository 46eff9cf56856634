"""The index is a cache: whatever happens to it, the results folders give the same rows again."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from influence.rundir import RunPaths
from launcher.collect import collect
from launcher.database import default_path
from launcher.errors import UsageError
from launcher.index import Index
from tests.launcher.synthetic_run import RUN, TIMINGS, SyntheticRun, step_arrays


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "index.sqlite"


def collected(
    tmp_path: Path, results: Path, run: str = RUN, steps: int = 2, **changes: object
) -> SyntheticRun:
    made = SyntheticRun.make(tmp_path / "runs", run, training={"total_steps": steps}, **changes).complete()
    collect(made.paths, results)
    return made


def rows(path: Path) -> dict[str, list[tuple[object, ...]]]:
    with Index(path) as index:
        return index.dump()


def no_words(words: str) -> None:
    raise AssertionError(f"the index had something to say: {words}")


# What is in it


def test_a_collected_run_has_rows_in_every_table(tmp_path: Path, results: Path, path: Path) -> None:
    run = collected(tmp_path, results)
    with Index(path, no_words) as index:
        index.update(results, RUN)
        (row,) = index.runs(results)
        dump = index.dump()
    arrays = [step_arrays(run.spec, seed=step) for step in (1, 2)]
    assert (row["run"], row["folder"], row["state"]) == (RUN, str(results), "complete")
    assert (row["steps"], row["total_steps"], row["rows"]) == (2, 2, 24)
    assert row["positions"] == sum(a.num_positions for a in arrays)
    assert row["scoring_s"] == pytest.approx(3.432)
    assert (row["preset"], row["overlays"], row["device"]) == ("alltoken-timing", "", "cuda")
    assert (row["wandb_mode"], row["wandb_url"]) == (
        "online",
        f"https://wandb.ai/team/token-influence/runs/{RUN}",
    )
    assert {name: len(table) for name, table in dump.items() if name not in ("timings", "metrics")} == {
        "runs": 1, "attempts": 1, "steps": 2, "links": 1,
    }  # fmt: skip
    timed = {(step, name): seconds for _, _, step, name, seconds in dump["timings"]}
    assert {name: timed[1, name] for name in TIMINGS} == TIMINGS
    assert timed[2, "update_actor"] == 230.518
    measured = {(step, name): value for _, _, step, name, value in dump["metrics"]}
    assert measured[1, "influence_trace/rows_emitted"] == 12


def test_no_free_text_gets_into_it(tmp_path: Path, results: Path, path: Path) -> None:
    secret = "s3cr3t-0123456789abcdef"  # noqa: S105 - nobody's
    run = SyntheticRun.make(tmp_path / "runs", verl={"trainer.note": secret})
    run.wandb["api_key"] = secret
    run.wandb["url"] = f"https://user:{secret}@wandb.example/x"
    shutil.rmtree(run.paths.root_dir)
    run.create()
    attempt = run.attempt()
    run.commit(attempt, 1)
    attempt.finish(1, f"401: the key {secret} is not valid")
    run.paths.log(1).write_text(secret)
    collect(run.paths, results)
    with Index(path) as index:
        index.update(results, RUN)
        files = [file.read_bytes() for file in path.parent.iterdir()]
    assert not any(secret.encode() in data for data in files)


def test_half_a_character_in_a_name_is_stored_escaped(tmp_path: Path, results: Path, path: Path) -> None:
    run = SyntheticRun.make(tmp_path / "runs")
    run.attempt(host="HOST")
    record = run.paths.attempt(1)
    record.write_text(record.read_text().replace("HOST", r"h\ud800"))
    collect(run.paths, results)
    with Index(path, no_words) as index:
        index.update(results, RUN)
        (row,) = index.dump()["attempts"]
    assert row[-1] == r"h\ud800"


# Rebuilding


_ACTION = st.tuples(
    st.sampled_from(["collect", "commit", "forget", "refresh"]),
    st.sampled_from(["infl-a", "infl-b", "infl-c"]),
)


@hypothesis_settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(actions=st.lists(_ACTION, max_size=8))
def test_rebuilding_gives_the_rows_that_collecting_gave(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, str]]
) -> None:
    home = tmp_path_factory.mktemp("home")
    folder, path = home / "results", home / "index.sqlite"
    runs: dict[str, SyntheticRun] = {}
    with Index(path, no_words) as index:
        for action, name in actions:
            run = runs.get(name) or SyntheticRun.make(home / "runs", name)
            runs[name] = run
            if action == "commit":
                done = run.paths.committed_step_numbers()
                if len(done) < 2:
                    run.commit(run.attempt(resume=len(done)), len(done) + 1)
            elif action == "collect":
                collect(run.paths, folder)
                index.update(folder, name)
            elif action == "forget":
                shutil.rmtree(folder / name, ignore_errors=True)
                index.refresh(folder)
            else:
                index.refresh(folder)
        kept = index.dump()
        assert index.rebuild([folder]) == []
        assert index.dump() == kept
    path.unlink()
    with Index(path, no_words) as index:
        index.rebuild([folder])
        assert index.dump() == kept
    path.unlink()
    with Index(path, no_words) as index:
        index.refresh(folder)
        assert index.dump() == kept


def test_rebuilding_keeps_the_other_folders_that_it_knows(tmp_path: Path, results: Path, path: Path) -> None:
    run = collected(tmp_path, results)
    collect(run.paths, tmp_path / "other")
    with Index(path) as index:
        index.refresh(results)
        index.refresh(tmp_path / "other")
        kept = index.dump()
        index.rebuild([results])
        assert index.dump() == kept
        assert index.folders() == sorted([str(results), str(tmp_path / "other")])
        assert len(index.runs()) == 2
        assert len(index.runs(results)) == 1


def test_a_copy_that_cannot_be_read_is_told_and_left_out(tmp_path: Path, results: Path, path: Path) -> None:
    collected(tmp_path, results)
    collected(tmp_path, results, "infl-other")
    with Index(path) as index:
        index.refresh(results)
        (results / RUN / "run.json").write_text("{")
        (results / RUN / "manifest.json").touch()
        (problem,) = index.refresh(results)
        assert "run.json" in problem.what
        assert problem.next_step == f"launcher collect --run {RUN} --results {results}"
        assert [row["run"] for row in index.runs()] == ["infl-other"]
        assert len(index.rebuild([results])) == 1
        assert [row["run"] for row in index.runs()] == ["infl-other"]


def test_what_has_not_changed_is_not_read_again(tmp_path: Path, results: Path, path: Path) -> None:
    collected(tmp_path, results)
    with Index(path) as index:
        index.update(results, RUN)
        kept = index.dump()
        (results / RUN / "run.json").write_text("{")  # to be read would show
        assert index.refresh(results) == []
        assert index.dump() == kept


# Damage


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def _overwritten_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for at in range(4096, len(data) - 100, 4096):
        data[at : at + 100] = b"\xa5" * 100
    path.write_bytes(data)


def _other_version(path: Path) -> None:
    _execute(path, "PRAGMA user_version = 99")


def _table_gone(path: Path) -> None:
    _execute(path, "DROP TABLE steps")


def _table_changed(path: Path) -> None:
    _execute(path, "ALTER TABLE steps ADD COLUMN extra TEXT")


def _execute(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize("damage", [_cut, _overwritten_page, _other_version, _table_gone, _table_changed])
def test_a_damaged_index_is_made_anew_with_a_word(
    tmp_path: Path, results: Path, path: Path, damage: Callable[[Path], None]
) -> None:
    for name in (RUN, "infl-b", "infl-c"):
        collected(tmp_path, results, name)
    with Index(path) as index:
        index.refresh(results)
        kept = index.dump()
    damage(path)
    words: list[str] = []
    with Index(path, words.append) as index:
        index.refresh(results)
        index.update(results, RUN)
        assert index.dump() == kept
    assert len(words) == 1
    assert str(path) in words[0]
    assert path.with_name("index.sqlite.damaged").exists()
    with Index(path, no_words) as index:
        assert index.dump() == kept


def test_an_index_that_is_damaged_while_it_is_open_is_made_anew(
    tmp_path: Path, results: Path, path: Path
) -> None:
    collected(tmp_path, results)
    words: list[str] = []
    with Index(path, words.append) as index:
        index.refresh(results)
        kept = index.dump()
        _execute(path, "DROP TABLE metrics")
        index.update(results, RUN)
        assert index.dump() == kept
    assert len(words) == 1


def _their_database(path: Path) -> None:
    _execute(path, "CREATE TABLE thesis (chapter TEXT)")


def _their_empty_database(path: Path) -> None:
    _execute(path, "PRAGMA user_version = 7")


def _their_text(path: Path) -> None:
    path.write_text('{"run": "infl-a"}')


def _their_bytes(path: Path) -> None:
    path.write_bytes(b"no database " * 1000)


def _start_of_a_database(path: Path) -> None:
    path.write_bytes(b"SQLite format 3\0")


@pytest.mark.parametrize(
    "make", [_their_database, _their_empty_database, _their_text, _their_bytes, _start_of_a_database]
)
def test_a_file_that_is_no_index_is_not_touched(path: Path, make: Callable[[Path], None]) -> None:
    path.parent.mkdir()
    make(path)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="not an index of the launcher") as refused:
        Index(path)
    assert "INFL_INDEX" in str(refused.value.next_step)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"


def test_what_is_no_file_is_no_index(path: Path) -> None:
    path.mkdir(parents=True)
    fifo = path / "fifo"
    os.mkfifo(fifo)
    for there in (path, fifo, Path("/dev/null")):
        with pytest.raises(UsageError, match="not an index of the launcher"):
            Index(there)
    assert list(path.parent.iterdir()) == [path]
    assert list(path.iterdir()) == [fifo]
    assert not Path("/dev/null.lock").exists()


def test_an_empty_file_becomes_an_index(tmp_path: Path, results: Path) -> None:
    collected(tmp_path, results)
    (tmp_path / "empty").touch()
    with Index(tmp_path / "empty", no_words) as index:
        index.refresh(results)
        assert len(index.runs()) == 1


def test_where_no_file_can_be_kept_memory_serves(tmp_path: Path, results: Path) -> None:
    collected(tmp_path, results)
    (tmp_path / "file").write_text("")
    words: list[str] = []
    with Index(tmp_path / "file" / "index.sqlite", words.append) as index:
        index.refresh(results)
        assert [row["run"] for row in index.runs(results)] == [RUN]
    assert "INFL_INDEX" in words[0]


def test_on_a_full_disk_memory_serves_with_what_was_stored(tmp_path: Path, results: Path, path: Path) -> None:
    collected(tmp_path, results)
    with Index(path) as index:
        index.refresh(results)
    names = [RUN, *(f"infl-{number}" for number in range(12))]
    for name in names[1:]:
        collected(tmp_path, results, name)
    words: list[str] = []
    with Index(path, words.append) as index:
        index._database._connection.execute("PRAGMA max_page_count = 1")  # SQLite's own "disk full"
        assert index.refresh(results) == []
        assert sorted(row["run"] for row in index.runs()) == sorted(names)
    assert len(words) == 1
    assert "database or disk is full" in words[0]
    assert "INFL_INDEX" in words[0]
    with Index(path, no_words) as index:
        assert [row["run"] for row in index.runs()] == [RUN]


# Several at once


_UPDATE = """
import sys
from pathlib import Path
from launcher.index import Index

def tell(words):
    sys.exit(words)

for name in sys.argv[3:]:
    with Index(Path(sys.argv[1]), tell) as index:
        index.update(Path(sys.argv[2]), name)
"""


def test_writers_at_once_leave_every_run(tmp_path: Path, results: Path, path: Path) -> None:
    names = [f"infl-{letter}" for letter in "abcdef"]
    for name in names:
        collected(tmp_path, results, name)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _UPDATE, str(path), str(results), *names[n:], *names[:n]],
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(4)
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    together = rows(path)
    assert [row[1] for row in together["runs"]] == names
    path.unlink()
    with Index(path) as index:
        index.rebuild([results])
        assert index.dump() == together


def test_a_writer_waits_for_another_ones_transaction(tmp_path: Path, results: Path, path: Path) -> None:
    collected(tmp_path, results)
    with Index(path) as index:
        index.update(results, RUN)
        before = index.dump()
        index._database._connection.execute("BEGIN IMMEDIATE")
        process = subprocess.Popen(
            [sys.executable, "-c", _UPDATE, str(path), str(results), RUN], stderr=subprocess.PIPE, text=True
        )
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=1.0)
        assert index.dump() == before
        index._database._connection.execute("ROLLBACK")
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err


# Where it lies


def test_the_index_lies_in_the_cache_directory_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("INFL_INDEX", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert default_path() == Path("/home/me/.cache/influence-launcher/index.sqlite")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/to/be/ignored")
    assert default_path() == Path("/home/me/.cache/influence-launcher/index.sqlite")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_path() == Path("/cache/influence-launcher/index.sqlite")
    monkeypatch.setenv("INFL_INDEX", "/tmp/here.sqlite")
    assert default_path() == Path("/tmp/here.sqlite")


def test_one_folder_has_one_key_however_it_is_spelled(
    tmp_path: Path, results: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collected(tmp_path, results)
    (tmp_path / "link").symlink_to(results)
    monkeypatch.chdir(tmp_path)
    with Index(path) as index:
        for spelled in (Path("results"), tmp_path / "link", results / ".." / "results"):
            index.refresh(spelled)
        assert index.folders() == [str(results)]
        assert len(index.runs()) == 1


def test_a_linked_copy_is_not_indexed(tmp_path: Path, results: Path, path: Path) -> None:
    collected(tmp_path, tmp_path / "other")
    results.mkdir()
    (results / RUN).symlink_to(tmp_path / "other" / RUN)
    with Index(path) as index:
        assert index.refresh(results) == []
        assert index.runs() == []
    assert RunPaths.of(tmp_path / "other", RUN).root_dir.is_dir()
