from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
import torch

from influence import timing
from influence.timing import PARTS, PHASES, PhaseTimer, Stopwatch

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


def test_what_nobody_reads_does_not_grow_for_ever(
    ticks: Iterator[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_MOST_SPANS", 6)
    watch = Stopwatch(on_gpu=False)
    for _ in range(100):
        with watch.span("capture"):
            pass
        with watch.phases("pop_rows") as ended:
            for phase in PHASES:
                ended(phase)
            with watch.span("copy_to_host"):
                pass
    assert len(watch._spans) <= 6 + len(PHASES) + 2
    expected = dict.fromkeys((*PHASES, "capture", "copy_to_host"), 100.0) | {"pop_rows": 400.0}
    assert watch.pop() == expected
    assert watch.pop() == {}


def test_a_span_that_raises_is_kept(ticks: Iterator[int]) -> None:
    timer = PhaseTimer(CPU)
    with pytest.raises(KeyError), timer.span("capture"):
        raise KeyError
    assert timer.pop()["capture"] == 1.0


def test_phases_share_the_boundaries_between_them(ticks: Iterator[int]) -> None:
    timer = PhaseTimer(CPU)
    with timer.phases("pop_rows") as ended:
        for phase in PHASES:
            ended(phase)
    assert next(ticks) == 1 + len(PHASES)
    expected = dict.fromkeys(PHASES, 1.0) | {"other": 0.0, "pop_rows": float(len(PHASES)), "capture": 0.0}
    assert timer.pop() == expected | dict.fromkeys(PARTS, 0.0)


def test_phases_that_had_ended_are_kept_when_the_next_raises(ticks: Iterator[int]) -> None:
    timer = PhaseTimer(CPU)
    with pytest.raises(KeyError), timer.phases("pop_rows") as ended:
        ended("grad_staging")
        raise KeyError
    seconds = timer.pop()
    assert (seconds["grad_staging"], seconds["pop_rows"]) == (1.0, 1.0)


def test_events_that_were_read_are_recorded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Event] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            made.append(self)

        def record(self, stream: object) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (self is not end)

    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.current_stream", torch.cpu.current_stream, raising=False)
    monkeypatch.setattr(torch.cpu.Stream, "synchronize", lambda self: None, raising=False)
    timer = PhaseTimer(torch.device("cuda"))
    for _ in range(3):
        with timer.phases("pop_rows") as ended, timer.span("all_gather"):
            for phase in PHASES:
                ended(phase)
        assert timer.pop()["grad_staging"] == 1.0
    assert len(made) == 1 + len(PHASES) + 2


def test_disabled_reads_no_clock(ticks: Iterator[int]) -> None:
    timer = PhaseTimer(CPU, enabled=False)
    with timer.span("capture"), timer.phases("pop_rows") as ended:
        ended("grad_staging")
    assert timer.pop() == {}
    assert next(ticks) == 0
