from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
import torch

from influence.timing import PARTS, PHASES, PhaseTimer

CPU = torch.device("cpu")


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A clock that advances by a second each time it is read."""
    clock = count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    return clock


def test_what_no_phase_measured_is_other(ticks: Iterator[int]) -> None:
    timer = PhaseTimer(CPU)
    with timer.span("capture"):
        pass
    with timer.span("pop_rows"):  # starts at 2
        for phase in PHASES:  # each a second long, a second apart
            with timer.span(phase):
                pass
        next(ticks)  # ends at 12
    expected = dict.fromkeys(PHASES, 1.0) | {"other": 6.0, "pop_rows": 10.0, "capture": 1.0}
    assert timer.pop() == expected | dict.fromkeys(PARTS, 0.0)


def test_a_part_is_counted_within_its_phase_and_not_twice(ticks: Iterator[int]) -> None:
    timer = PhaseTimer(CPU)
    with timer.span("pop_rows"), timer.span("grad_staging"), timer.span("all_gather"):
        pass
    seconds = timer.pop()
    assert (seconds["all_gather"], seconds["grad_staging"], seconds["other"]) == (1.0, 3.0, 2.0)
    assert seconds["pop_rows"] == 5.0


def test_spans_of_a_name_add_up_until_read(ticks: Iterator[int]) -> None:
    timer = PhaseTimer(CPU)
    for _ in range(3):
        with timer.span("capture"):
            next(ticks)
    assert timer.pop()["capture"] == 6.0
    assert timer.pop()["capture"] == 0.0


def test_a_span_that_raises_is_kept(ticks: Iterator[int]) -> None:
    timer = PhaseTimer(CPU)
    with pytest.raises(KeyError), timer.span("capture"):
        raise KeyError
    assert timer.pop()["capture"] == 1.0


def test_disabled_reads_no_clock(ticks: Iterator[int]) -> None:
    timer = PhaseTimer(CPU, enabled=False)
    with timer.span("pop_rows"):
        pass
    assert timer.pop() == {}
    assert next(ticks) == 0
