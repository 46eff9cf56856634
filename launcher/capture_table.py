"""How a run's responses were captured, from the tracer's own counts."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.evidence import FRACTIONS, CollectedRun
from launcher.tables import Table
from launcher.timing_tables import MAX_STEP_COLUMNS

_NOTE = (
    "Fractions are of the captured rows, fallback counts micro-batches. What is 0 in every step is left out."
)


def capture(run: CollectedRun) -> Table | None:
    """Each count in its steps; None where no step says how it was captured."""
    counts = {step: run.capture_counts(step) for step in run.steps}
    names = list(dict.fromkeys(name for step in counts.values() for name in step))
    each = len(counts) <= MAX_STEP_COLUMNS
    headers = ["count", *([f"step {step}" for step in counts] if each else ("mean", "least", "greatest"))]
    rows = []
    for name in names:
        values = [step.get(name) for step in counts.values()]
        known = [value for value in values if value is not None]
        if name not in FRACTIONS and not any(known):
            continue
        cells = [_cell(name, value) for value in values] if each else _over_steps(name, known)
        rows.append([name, *cells])
    if not rows:
        return None
    return Table("Capture", headers, rows, right=frozenset(range(1, len(headers))), notes=[_NOTE])


def _over_steps(name: str, values: Sequence[float]) -> list[str]:
    return [f"{sum(values) / len(values):.3f}", _cell(name, min(values)), _cell(name, max(values))]


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if name in FRACTIONS else f"{value:,.10g}"
