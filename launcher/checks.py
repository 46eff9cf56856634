"""What a collected run is held against: each check compares an expectation with what was found.

A check without the evidence that it needs is ``not checked`` and says why; it never passes by default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from influence.rundir.record import CommitRecord
from launcher.evidence import PHASES, WHOLE, CollectedRun
from launcher.manifest import Problem, ScoreFacts
from launcher.tables import size

_CAPTURED = "captured_tokens"
_EMITTED = "rows_emitted"
_SUM_TOLERANCE = 0.01


class Result(StrEnum):
    PASS = "pass"  # noqa: S105 - a result, no password
    FAIL = "FAIL"
    NOT_CHECKED = "not checked"

    @property
    def in_words(self) -> str:
        return {"pass": "passed", "FAIL": "failed"}.get(self.value, self.value)


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the validation table."""

    name: str
    expected: str
    found: str
    result: Result


def validate(run: CollectedRun) -> list[Check]:
    """All checks, in the order of the report."""
    counted = [(record, facts) for step, record in run.steps.items() if (facts := run.facts(step))]
    return [
        _steps(run),
        _files(run),
        _rows(run, counted),
        _records(run, counted),
        _metric(run, counted, "rows emitted by the tracer", _EMITTED, lambda facts: facts.num_rows),
        _positions(counted),
        _metric(
            run, counted, "positions captured by the tracer", _CAPTURED, lambda facts: facts.num_positions
        ),
        _none("NaN in valid positions", counted, lambda facts: facts.num_nan),
        _none("infinite scores", counted, lambda facts: facts.num_infinite),
        _nonzero(counted),
        _timing(run),
        _timing_sum(run),
    ]


_Counted = list[tuple[CommitRecord, ScoreFacts]]


def _steps(run: CollectedRun) -> Check:
    total = run.manifest.num_total_steps
    num_good = sum(run.facts(step) is not None for step in run.steps)
    return _compare("steps with a verified score file", str(total), str(num_good), num_good == total)


def _files(run: CollectedRun) -> Check:
    damaged = [f for f in run.manifest.findings if f.problem is not Problem.MISSING and not f.harmless]
    num_bytes = sum(entry.num_bytes for entry in run.manifest.files)
    found = f"{len(run.manifest.files)} sound, {size(num_bytes)}"
    if damaged:
        found = f"{len(damaged)} damaged: {damaged[0].file}{', ...' if len(damaged) > 1 else ''}"
    return _compare("files: size, SHA-256, none foreign", "all sound", found, not damaged)


def _rows(run: CollectedRun, counted: _Counted) -> Check:
    name = "rows (responses) a step"
    prompts, responses = (
        run.setting(f"training.{key}") for key in ("prompts_per_step", "responses_per_prompt")
    )
    if type(prompts) is not int or type(responses) is not int:
        return _not_checked(name, "the spec does not say how many")
    if not counted:
        return _not_checked(name, "no score file")
    expected = prompts * responses
    found = [facts.num_rows for _, facts in counted]
    return _compare(name, f"{expected:,}", _distinct(found), all(n == expected for n in found))


def _records(run: CollectedRun, counted: _Counted) -> Check:
    name = "commit records' counts = counts in the files"
    if not counted:
        return _not_checked(name, "no score file")
    wrong = [
        record.step
        for record, facts in counted
        if (record.rows, record.positions, record.nan_count)
        != (facts.num_rows, facts.num_positions, facts.num_nan)
    ]
    found = f"all {len(counted)} equal" if not wrong else f"differ in step {_list(wrong)}"
    return _compare(name, "equal", found, not wrong)


def _positions(counted: _Counted) -> Check:
    name = "valid positions = positions to capture"
    if not counted:
        return _not_checked(name, "no score file")
    return _totals(
        name,
        [facts.num_expected_positions for _, facts in counted],
        [facts.num_positions for _, facts in counted],
    )


def _metric(
    run: CollectedRun, counted: _Counted, what: str, counter: str, count: Callable[[ScoreFacts], int]
) -> Check:
    """The tracer's own counter against the file, where every step logged the counter."""
    name = f"{what} = in the files"
    logged = [run.counter(record.step, counter) for record, _ in counted]
    if not counted or any(value is None for value in logged):
        return _not_checked(name, f"no metric {counter}")
    return _totals(name, [value for value in logged if value is not None], [count(f) for _, f in counted])


def _none(name: str, counted: _Counted, count: Callable[[ScoreFacts], int]) -> Check:
    if not counted:
        return _not_checked(name, "no score file")
    num = sum(count(facts) for _, facts in counted)
    return _compare(name, "0", f"{num:,}", num == 0)


def _nonzero(counted: _Counted) -> Check:
    name = "scored rows have scores other than 0"
    scored = [(record, facts) for record, facts in counted if facts.num_scored_rows]
    if not scored:
        return _not_checked(name, "no group has a contrast")
    zero = [record.step for record, facts in scored if not facts.num_nonzero]
    num_nonzero, num_all = (
        sum(facts.num_nonzero for _, facts in scored),
        sum(facts.num_positions for _, facts in scored),
    )
    found = f"all zero in step {_list(zero)}" if zero else f"{num_nonzero:,} of {num_all:,}"
    return _compare(name, "some", found, not zero)


def _timing(run: CollectedRun) -> Check:
    name = f"{WHOLE} took time in every step"
    seconds = [run.timings(step).get(WHOLE) for step in run.steps]
    if not seconds or any(value is None for value in seconds):
        return _not_checked(name, "no timings (influence.profile_timing is off?)")
    measured = [value for value in seconds if value is not None]
    zero = [step for step, value in zip(run.steps, measured, strict=True) if value <= 0]
    found = f"0 s in step {_list(zero)}" if zero else f"{min(measured):.3f} to {max(measured):.3f} s"
    return _compare(name, "> 0 s", found, not zero)


def _timing_sum(run: CollectedRun) -> Check:
    name = f"phases add up to {WHOLE} (within 1 %)"
    worst = 0.0
    for step in run.steps:
        seconds = run.timings(step)
        if WHOLE not in seconds or not any(phase in seconds for phase in PHASES):
            return _not_checked(name, "no timings of the phases")
        whole = seconds[WHOLE]
        if whole > 0:
            parts = sum(seconds.get(phase, 0.0) for phase in PHASES)
            worst = max(worst, abs(parts - whole) / whole)
    if not run.steps:
        return _not_checked(name, "no step")
    return _compare(name, "<= 1 % off", f"{100 * worst:.1f} % off", worst <= _SUM_TOLERANCE)


def _totals(name: str, expected: Iterable[float], found: Iterable[float]) -> Check:
    """Equal in every step; shows the sums over the steps."""
    expected, found = list(expected), list(found)
    return _compare(name, f"{sum(expected):,.0f}", f"{sum(found):,.0f}", expected == found)


def _compare(name: str, expected: str, found: str, good: bool) -> Check:
    return Check(name, expected, found, Result.PASS if good else Result.FAIL)


def _not_checked(name: str, why: str) -> Check:
    return Check(name, "", why, Result.NOT_CHECKED)


def _distinct(numbers: Iterable[int]) -> str:
    return " or ".join(f"{n:,}" for n in sorted(set(numbers)))


def _list(steps: list[int]) -> str:
    return ", ".join(str(step) for step in steps[:5]) + (", ..." if len(steps) > 5 else "")
