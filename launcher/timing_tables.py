"""Where the time went: the tracer's scoring by phase, and the whole step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from launcher.evidence import PHASES, WHOLE, CollectedRun
from launcher.tables import Table

MAX_STEP_COLUMNS = 3
"""With more steps than this, a table shows mean, least and greatest over the steps instead of each step."""
_STEP = "step"
# In the order of a step; indented below what contains them.
_ORDER = {
    "gen": 0, "reward": 0, "old_log_prob": 0, "ref": 0, "values": 0, "adv": 0,
    "update_actor": 0, "capture": 1, "forward_1": 2, "logprob_backward": 2,
    WHOLE: 1, "all_gather": 2, "copy_to_host": 2,
    "forward_2": 1, "loss_backward": 1, "commit": 1,
    "update_weights": 0, "save_checkpoint": 0, "testing": 0, _STEP: 0,
}  # fmt: skip
_NESTED = "Indented phases are part of the one above them; start-up and waiting have no phase of their own."


def scoring_time(run: CollectedRun) -> Table | None:
    """The phases of ``pop_rows`` in seconds and per cent of it; None where nothing was timed."""
    names = [name for name in (*PHASES, WHOLE) if any(name in run.timings(step) for step in run.steps)]
    if WHOLE not in names:
        return None
    return _table("Scoring time by phase", run, names, WHOLE)


def step_time(run: CollectedRun) -> Table | None:
    """Everything else that was timed, in seconds and per cent of the step; None where nothing was."""
    # Names with a slash are verl's statistics over the responses of a step; --output json has them.
    seen = {name for step in run.steps for name in run.timings(step) if "/" not in name} - set(PHASES)
    names = [name for name in _ORDER if name in seen]
    # What a later verl times is shown too, before the total.
    names = (
        [*names[:-1], *sorted(seen - set(names)), _STEP]
        if _STEP in seen
        else names + sorted(seen - set(names))
    )
    if not names:
        return None
    return replace(_table("Step time", run, names, _STEP), notes=[_NESTED] if "update_actor" in names else [])


def _table(title: str, run: CollectedRun, names: Sequence[str], whole: str) -> Table:
    """Rows of phases; a phase that a step did not time is a dash there and no part of its mean."""
    timings = {step: run.timings(step) for step in run.steps}
    decimals = _decimals([seconds[name] for seconds in timings.values() for name in names if name in seconds])
    each = len(timings) <= MAX_STEP_COLUMNS
    headers = [f"phase (% of {whole})"]
    if each:
        headers += [text for step in timings for text in (f"step {step}, s", "%")]
    if len(timings) > 1:
        headers += ["mean, s", "%"]
    if not each:
        headers += ["least, s", "greatest, s"]
    mean_whole = _mean([seconds[whole] for seconds in timings.values() if whole in seconds])
    rows = []
    for name in names:
        measured = [seconds[name] for seconds in timings.values() if name in seconds]
        row = ["  " * _ORDER.get(name, 0) + name if whole == _STEP else name]
        if each:
            for seconds in timings.values():
                row += _cells(seconds.get(name), seconds.get(whole), decimals)
        if len(timings) > 1:
            row += _cells(_mean(measured), mean_whole, decimals)
        if not each:
            row += [f"{min(measured):.{decimals}f}", f"{max(measured):.{decimals}f}"]
        rows.append(row)
    return Table(title, headers, rows, right=frozenset(range(1, len(headers))))


def _cells(seconds: float | None, whole: float | None, decimals: int) -> tuple[str, str]:
    if seconds is None:
        return "-", "-"
    return f"{seconds:.{decimals}f}", f"{100 * seconds / whole:.1f}" if whole else "-"


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _decimals(seconds: Sequence[float]) -> int:
    """Milliseconds, or microseconds where a millisecond would show as nothing."""
    return 6 if any(0 < abs(value) < 0.001 for value in seconds) else 3
