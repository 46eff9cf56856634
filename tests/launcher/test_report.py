"""The tables of a run: what they say, that they fit, and that they never say more than the evidence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from influence.rundir import StepArrays
from launcher.checks import Result, validate
from launcher.collect import collect
from launcher.evidence import CollectedRun, read_collected
from launcher.report import document, tables
from launcher.tables import MAX_COLUMNS, Table, as_markdown, as_text, cell
from tests.launcher.synthetic_run import CAPTURED, RUN, TIMINGS, SyntheticRun, step_arrays

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 30 s at every look."""
    ticks = count()

    def now() -> str:
        minutes, half = divmod(next(ticks), 2)
        return f"2026-02-21T09:{minutes:02d}:{30 * half:02d}.000Z"

    for module in ("influence.rundir.attempts", "influence.rundir.commit", "launcher.collect"):
        monkeypatch.setattr(f"{module}.utc_now", now)


def eventful_run(home: Path) -> CollectedRun:
    """Attempt 1 commits two steps and is killed; attempt 2 goes on from step 1, so step 2 differs."""
    run = SyntheticRun.make(
        home / "runs",
        training={"total_steps": 3},
        overlays=["tiny-cpu"],
        hardware={"device": "cpu", "ranks_per_node": 2},
        code={"dirty": True, "diff_sha256": "2e" * 32},
    )
    first = run.attempt()
    run.commit(first, 1, metrics=_counted(step_arrays(run.spec, seed=1)) | CAPTURED)
    run.commit(first, 2)
    run.paths.local_dir.mkdir()
    run.paths.events_jsonl.write_text(
        '{"at": "2026-02-21T09:07:00.000Z", "attempt": 1, "event": "attempt_ended", "exit_code": 137}\n'
    )
    second = run.attempt(resume=1)
    again = step_arrays(run.spec, seed=2, uid="again")
    counted = _counted(again) | CAPTURED | _HALF_FUSED
    run.commit(second, 2, again, timings=TIMINGS | {"capture": 115.32}, metrics=counted)
    run.commit(second, 3)
    second.finish(0, "all steps committed")
    collect(run.paths, home / "results")
    return read_collected(home / "results", RUN)


_HALF_FUSED = {"fused_fraction": 0.5, "shared_fraction": 0.5, "fallback_zero_advantage": 1200}


def _counted(arrays: StepArrays) -> dict[str, float]:
    return {"rows_emitted": arrays.num_rows, "captured_tokens": arrays.num_positions}


def with_fixed_places(run: CollectedRun) -> CollectedRun:
    manifest = replace(run.manifest, source=f"/data/runs/{RUN}")
    return replace(run, folder=Path("/home/me/results"), manifest=manifest)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("render", "golden"), [(as_text, "results_show.txt"), (as_markdown, "results_show.md")]
)
def test_the_report_of_a_fixed_run_is_the_golden_one(
    tmp_path: Path, render: Callable[[list[Table]], list[str]], golden: str
) -> None:
    """After a wanted change run this with ``INFL_UPDATE_GOLDEN=1`` and read the difference."""
    shown = "\n".join(render(tables(with_fixed_places(eventful_run(tmp_path))))) + "\n"
    if os.environ.get("INFL_UPDATE_GOLDEN"):
        (GOLDEN / golden).write_text(shown)
    assert shown == (GOLDEN / golden).read_text()


def collected(
    tmp_path: Path, spoil: Callable[[SyntheticRun], None] | None = None, **changes: Any
) -> CollectedRun:
    run = SyntheticRun.make(tmp_path / "runs", **changes)
    if spoil is None:
        run.complete()
    else:
        spoil(run)
    collect(run.paths, tmp_path / "results")
    return read_collected(tmp_path / "results", run.paths.name)


def results(run: CollectedRun) -> dict[str, Result]:
    return {check.name: check.result for check in validate(run)}


def failed(run: CollectedRun) -> set[str]:
    return {name for name, result in results(run).items() if result is not Result.PASS}


# The checks can fail


def test_a_good_run_passes_every_check(tmp_path: Path) -> None:
    assert set(results(collected(tmp_path)).values()) == {Result.PASS}


def _nan(run: SyntheticRun) -> None:
    arrays = step_arrays(run.spec, seed=1)
    scores = arrays.scores.copy()
    scores[3] = np.nan
    _commit_both(run, replace(arrays, scores=scores))


def _infinite(run: SyntheticRun) -> None:
    arrays = step_arrays(run.spec, seed=1)
    scores = arrays.scores.copy()
    scores[3] = -np.inf
    _commit_both(run, replace(arrays, scores=scores))


def _all_zero(run: SyntheticRun) -> None:
    arrays = step_arrays(run.spec, seed=1)
    _commit_both(run, replace(arrays, scores=np.zeros_like(arrays.scores)))


def _too_few_rows(run: SyntheticRun) -> None:
    _commit_both(run, step_arrays(run.spec | {"training": run.spec["training"] | {"prompts_per_step": 2}}))


def _token_lost(run: SyntheticRun) -> None:
    arrays = step_arrays(run.spec, seed=1)
    longer = arrays.response_length.copy()
    longer[0] += 1
    _commit_both(run, replace(arrays, response_length=longer))


def _zero_timing(run: SyntheticRun) -> None:
    _commit_both(run, step_arrays(run.spec), timings=dict.fromkeys(TIMINGS, 0.0))


def _phases_too_short(run: SyntheticRun) -> None:
    _commit_both(run, step_arrays(run.spec), timings=TIMINGS | {"hessian_solve": 1.0})


def _wrong_counter(run: SyntheticRun) -> None:
    metrics = {"influence_trace/rows_emitted": 11.0, "influence_trace/captured_tokens": 1.0}
    _commit_both(run, step_arrays(run.spec), metrics=metrics)


def _step_missing(run: SyntheticRun) -> None:
    run.commit(run.attempt(), 1)


def _npz_cut(run: SyntheticRun) -> None:
    run.complete()
    run.paths.step_npz(2).write_bytes(b"PK")


def _commit_both(run: SyntheticRun, arrays: Any, **fields: Any) -> None:
    attempt = run.attempt()
    run.commit(attempt, 1, arrays, **fields)
    run.commit(attempt, 2, step_arrays(run.spec, seed=2))
    attempt.finish(0, "done")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_nan, {"NaN in valid positions"}),
        (_infinite, {"infinite scores"}),
        (_all_zero, {"scored rows have scores other than 0"}),
        (_too_few_rows, {"rows (responses) a step"}),
        (_token_lost, {"valid positions = positions to capture"}),
        (_zero_timing, {"pop_rows took time in every step"}),
        (_phases_too_short, {"phases add up to pop_rows (within 1 %)"}),
        (
            _wrong_counter,
            {"rows emitted by the tracer = in the files", "positions captured by the tracer = in the files"},
        ),
        (_step_missing, {"steps with a verified score file"}),
        (_npz_cut, {"steps with a verified score file", "files: size, SHA-256, none foreign"}),
    ],
)
def test_each_check_fails_for_its_own_reason_alone(
    tmp_path: Path, spoil: Callable[[SyntheticRun], None], expected: set[str]
) -> None:
    run = collected(tmp_path, spoil)
    assert failed(run) == expected
    assert all(results(run)[name] is Result.FAIL for name in expected)


def test_a_record_that_miscounts_its_file_fails(tmp_path: Path) -> None:
    run = collected(tmp_path)
    facts = {file: replace(facts, num_nan=5) for file, facts in run.manifest.scores.items()}
    run = replace(run, manifest=replace(run.manifest, scores=facts))
    assert failed(run) == {"commit records' counts = counts in the files", "NaN in valid positions"}


def test_what_lacks_its_evidence_is_not_checked(tmp_path: Path) -> None:
    def bare(run: SyntheticRun) -> None:
        arrays = step_arrays(run.spec, seed=1)
        arrays = replace(arrays, scored=np.zeros_like(arrays.scored), scores=np.zeros_like(arrays.scores))
        attempt = run.attempt()
        for step in (1, 2):
            run.commit(attempt, step, arrays, timings={}, metrics={})

    unchecked = {n for n, r in results(collected(tmp_path, bare)).items() if r is Result.NOT_CHECKED}
    assert unchecked == {
        "rows emitted by the tracer = in the files",
        "positions captured by the tracer = in the files",
        "scored rows have scores other than 0",
        "pop_rows took time in every step",
        "phases add up to pop_rows (within 1 %)",
    }


def test_a_run_without_a_step_has_a_report(tmp_path: Path) -> None:
    run = collected(tmp_path, lambda run: None)
    assert Result.PASS not in {r for n, r in results(run).items() if not n.startswith("files")}
    text = "\n".join(as_text(tables(run)))
    assert "0 of 2 steps" in text
    assert "No attempt has started." in text
    assert json.loads(json.dumps(document(run), allow_nan=False))["steps"] == []


# The evidence


def test_the_commit_record_goes_before_the_logged_timing_and_prefixes_go(tmp_path: Path) -> None:
    def commit(run: SyntheticRun) -> None:
        attempt = run.attempt()
        run.commit(attempt, 1, timings={"pop_rows": 2.0})
        data = {
            "timing_s/influence_pop_rows": 9.0, "timing_s/influence_capture": 4.0, "timing_s/gen": 5,
            "timing_s/agent_loop/max": 7.0, "actor/loss": 1.0, "text": "x", "odd": True,
        }  # fmt: skip
        line = {"step": 1, "data": data}
        with run.paths.metrics(1).open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    run = collected(tmp_path, commit, training={"total_steps": 1})
    timings = run.timings(1)
    assert (timings["pop_rows"], timings["capture"], timings["gen"]) == (2.0, 4.0, 5.0)
    assert run.metrics[1]["actor/loss"] == 1.0
    assert not {"actor/loss", "text", "odd"} & timings.keys()
    assert not {"text", "odd"} & run.metrics[1].keys()
    text = "\n".join(as_text(tables(run)))
    assert " gen " in text
    assert "agent_loop" not in text


@pytest.mark.parametrize("prefix", ["", "influence_trace/"])
def test_the_tracers_counters_are_found_by_either_name(tmp_path: Path, prefix: str) -> None:
    def commit(run: SyntheticRun) -> None:
        run.commit(run.attempt(), 1, metrics={f"{prefix}rows_emitted": 12.0, f"{prefix}captured_tokens": 3.0})

    named = results(collected(tmp_path, commit, training={"total_steps": 1}))
    assert named["rows emitted by the tracer = in the files"] is Result.PASS
    assert named["positions captured by the tracer = in the files"] is Result.FAIL


def test_metrics_of_a_step_are_those_of_the_attempt_in_the_lineage(tmp_path: Path) -> None:
    run = eventful_run(tmp_path)
    assert [record.attempt for record in run.steps.values()] == [1, 2, 2]
    assert "capture" not in run.timings(1)
    assert run.timings(2)["capture"] == 115.32


@pytest.mark.parametrize(
    ("events", "ended"),
    [
        ('{"event": "attempt_ended", "attempt": 1, "exit_code": -9, "at": "2026-02-21T09:07:00.000Z"}',
         "killed by SIGKILL (137), out of memory or killed from outside"),
        ('{"event": "attempt_ended", "attempt": 1, "exit_code": 78, "at": "2026-02-21T09:07:00.000Z"}',
         "configuration error (78)"),
        ('{"event": "attempt_ended", "attempt": 1, "exit_code": 9999, "at": "2026-02-21T09:07:00.000Z"}',
         "no end recorded: runs, or was killed"),
        ('{"event": "attempt_ended", "attempt": 1, "exit_code": 1, "at": "yesterday"}',
         "no end recorded: runs, or was killed"),
        ('[1]\n{"event": "attempt_en', "no end recorded: runs, or was killed"),
    ],
)  # fmt: skip
def test_the_supervisors_word_stands_in_for_an_attempt_that_could_not_speak(
    tmp_path: Path, events: str, ended: str
) -> None:
    def commit(run: SyntheticRun) -> None:
        run.attempt()
        run.paths.local_dir.mkdir()
        run.paths.events_jsonl.write_text(events + "\n")

    text = "\n".join(as_text(tables(collected(tmp_path, commit))))
    assert ended in " ".join(text.split())


@pytest.mark.parametrize(
    ("mode", "fields", "words"),
    [
        (
            "online",
            {"entity": "a b", "project": "p/q", "run_id": "r"},
            "https://wandb.ai/a%20b/p%2Fq/runs/r (unv",
        ),
        ("online", {"url": "https://wandb.example/x/runs/r"}, "https://wandb.example/x/runs/r (unverified"),
        ("online", {"url": "https://me:pw@wandb.example/x/runs/r"}, "the entity is not known from here"),
        ("online", {"url": "javascript:alert(1)"}, "the entity is not known from here"),
        ("online", {"entity": None, "project": "p", "run_id": "r"}, "the entity is not known from here"),
        (
            "offline",
            {"entity": "e", "project": "p", "run_id": "r"},
            "/wandb/offline-run-*` makes it https://wandb.ai/e/p/runs/r (unverified)",
        ),
        (
            "offline",
            {"entity": None, "project": "p", "run_id": "r"},
            "makes it <entity>/p/runs/r (unverified)",
        ),
        ("disabled", {}, "disabled"),
    ],
)
def test_links_are_built_or_said_to_be_unknown(
    tmp_path: Path, mode: str, fields: dict[str, Any], words: str
) -> None:
    run = collected(tmp_path)
    run = replace(run, run_spec=replace(run.run_spec, wandb={"mode": mode, **fields}))
    links = next(table for table in tables(run) if table.title == "Links")
    assert words in links.rows[0][1]


# How the responses were captured


def test_each_count_of_the_capture_is_shown_by_step_unless_it_is_0_in_all(tmp_path: Path) -> None:
    def commit(run: SyntheticRun) -> None:
        attempt = run.attempt()
        run.commit(attempt, 1, metrics=CAPTURED)
        logged = {f"influence_trace/{name}": value for name, value in (CAPTURED | _HALF_FUSED).items()}
        run.commit(attempt, 2, metrics=logged)

    run = collected(tmp_path, commit)
    assert _capture_rows(run) == {
        "fused_fraction": ["1.000", "0.500"],
        "shared_fraction": ["0.000", "0.500"],
        "separate_fraction": ["0.000", "0.000"],
        "on_policy_fraction": ["1.000", "1.000"],
        "fallback_zero_advantage": ["0", "1,200"],
        "groups": ["3", "3"],
        "skipped_groups": ["1", "1"],
        "double_sign_groups": ["2", "2"],
    }
    steps = document(run)["steps"]
    assert steps[1]["capture"]["fallback_zero_advantage"] == 1200
    assert steps[0]["capture"] == {n: value for n, value in CAPTURED.items() if n != "micro_batches"}


def test_the_capture_of_many_steps_is_summed_up(tmp_path: Path) -> None:
    def commit(run: SyntheticRun) -> None:
        attempt = run.attempt()
        run.commit(attempt, 1)  # a record that does not say how
        for step in range(2, 6):
            run.commit(attempt, step, metrics=CAPTURED | {"fallback_off_policy": step % 2})

    rows = _capture_rows(collected(tmp_path, commit, training={"total_steps": 5}))
    assert rows["fused_fraction"] == ["1.000", "1.000", "1.000"]
    assert rows["fallback_off_policy"] == ["0.500", "0", "1"]


def test_a_record_that_does_not_say_how_it_was_captured_has_no_such_table(tmp_path: Path) -> None:
    run = collected(tmp_path)
    assert _capture_rows(run) == {}
    assert [step["capture"] for step in document(run)["steps"]] == [{}, {}]


def test_every_way_and_reason_to_fall_back_that_the_trainer_counts_is_shown(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from influence.tracer import COUNTERS
    from influence.verl_engine.capture_pass import COUNTS

    known = dict.fromkeys((*COUNTERS, *COUNTS), 1.0)
    run = collected(
        tmp_path, lambda run: _commit_both(run, step_arrays(run.spec), metrics=_as_recorded(known))
    )
    told = {"micro_batches", "captured_tokens", "rows_emitted"}
    assert set(_capture_rows(run)) == _as_recorded(known).keys() - told


def _as_recorded(counts: dict[str, float]) -> dict[str, float]:
    from influence.verl_engine.output import _with_fractions

    return _with_fractions(counts)  # type: ignore[arg-type]


def _capture_rows(run: CollectedRun) -> dict[str, list[str]]:
    found = [table for table in tables(run) if table.title == "Capture"]
    return {name: cells for table in found for name, *cells in table.rows}


# What is counted


def test_what_counts_the_prompts_positions_too_is_not_called_tokens_of_the_response(tmp_path: Path) -> None:
    def commit(run: SyntheticRun) -> None:
        lengths = np.full(12, 3)
        arrays = step_arrays(run.spec, lengths=lengths + 2)
        positions = np.tile(np.arange(-2, 3), 12)
        run.commit(run.attempt(), 1, replace(arrays, positions=positions, response_length=lengths))

    changes = {"training": {"total_steps": 1}, "influence": {"positions": "all"}}
    run = collected(tmp_path, commit, **changes)
    (check,) = [c for c in validate(run) if c.name == "valid positions = positions to capture"]
    assert (check.found, check.result) == ("60", Result.PASS)
    (files,) = [table for table in tables(run) if table.title == "Score files"]
    assert files.rows[0][files.headers.index("positions")] == "60"


# Many steps


def test_many_steps_are_summed_up(tmp_path: Path) -> None:
    def commit(run: SyntheticRun) -> None:
        attempt = run.attempt()
        for step in range(1, 31):
            scale = 1 + step / 10
            run.commit(attempt, step, timings={name: value * scale for name, value in TIMINGS.items()})

    run = collected(tmp_path, commit, training={"total_steps": 30})
    text = as_text(tables(run))
    (whole,) = [line.split() for line in text if line.split()[:1] == ["pop_rows"] and "100.0" in line]
    mean = sum(3.432 * (1 + step / 10) for step in range(1, 31)) / 30
    assert whole == ["pop_rows", f"{mean:.3f}", "100.0", f"{3.432 * 1.1:.3f}", f"{3.432 * 4:.3f}"]
    assert sum(line.strip().startswith("...") for line in text) == 1
    assert any("6 rows in between are left out" in line for line in text)


# The form

_TEXT = st.text(st.characters(codec=None), max_size=40)


@given(_TEXT)
def test_a_cell_is_one_printable_line(text: str) -> None:
    shown = cell(text)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    shown.encode()


@hypothesis_settings(max_examples=50)
@given(st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20), st.text(max_size=400)), max_size=5))
def test_a_text_table_fits_the_terminal_unless_a_word_does_not(rows: list[tuple[str, str, str]]) -> None:
    lines = as_text([Table("title", ("a", "b", "c"), rows)])
    longest_word = max((len(word) for row in rows for text in row for word in cell(text).split()), default=0)
    used = 4 + 2 + 2 * max((len(cell(text)) for row in rows for text in row[:2]), default=1)
    assert all(len(line) <= max(MAX_COLUMNS, used + longest_word) for line in lines)


def test_the_whole_report_fits_the_terminal(tmp_path: Path) -> None:
    lines = as_text(tables(with_fixed_places(eventful_run(tmp_path))))
    assert max(map(len, lines)) <= MAX_COLUMNS


def test_nothing_in_a_markdown_cell_is_markup() -> None:
    hostile = "a|b `c` *d* [e](http://f) <script>\n# g \\"
    lines = as_markdown([Table("t", ("x", "y"), [(hostile, "1")])])
    row = lines[-1]
    unescaped = row.replace("\\\\", "")
    for mark in "|`*[]<>":
        assert row.count(mark) == row.count("\\" + mark) + (3 if mark == "|" else 0)
    assert "\n" not in row
    assert unescaped.startswith("| a")
