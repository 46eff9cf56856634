"""How long things take, measured without changing what is measured.

On a GPU an event is recorded in the stream at each boundary and all are read once, at the end: there is
no synchronization per span. An event costs the host a few microseconds, so phases that follow each other
share the one between them, and those that were read are used again. On the CPU the boundaries are
`time.perf_counter`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

PHASES = ("grad_staging", "hessian_solve", "token_scoring", "score_aggregation")
PARTS = ("all_gather", "copy_to_host")
"""Of phases, reported beside them: the first of ``grad_staging``, the second of ``score_aggregation``."""

_Mark = float | torch.cuda.Event
_MOST_SPANS = 4096
"""Kept before they are added up though nobody asked, so that what is never read does not grow for ever."""


class Stopwatch:
    """Adds up the spans of each name until they are read. Does nothing when not enabled."""

    def __init__(self, *, on_gpu: bool, enabled: bool = True) -> None:
        self._on_gpu = on_gpu
        self._enabled = enabled
        self._spans: list[tuple[str, _Mark, _Mark]] = []
        self._seconds: dict[str, float] = {}
        """Of spans that were added up before they were read."""
        self._num_open = 0
        self._read_events: list[torch.cuda.Event] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count what runs inside as `name`; kept also when it raises."""
        if not self._enabled:
            yield
            return
        self._open()
        start = self._mark()
        try:
            yield
        finally:
            self._num_open -= 1
            self._spans.append((name, start, self._mark()))

    @contextmanager
    def phases(self, name: str) -> Iterator[Callable[[str], None]]:
        """Count what runs inside as `name`, up to the last phase's end, and its phases one after another.

        What the block gets is called with a phase's name where it ends and the next begins.
        """
        if not self._enabled:
            yield lambda phase: None
            return
        self._open()
        stream = torch.cuda.current_stream() if self._on_gpu else None
        marks = [self._mark(stream)]

        def ended(phase: str) -> None:
            marks.append(self._mark(stream))
            self._spans.append((phase, marks[-2], marks[-1]))

        try:
            yield ended
        finally:
            self._num_open -= 1
            self._spans.append((name, marks[0], marks[-1]))

    def pop(self) -> dict[str, float]:
        """Seconds by name since the last call; names without a span are absent."""
        self._add_up()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _open(self) -> None:
        if self._num_open == 0 and len(self._spans) >= _MOST_SPANS:
            self._add_up()
        self._num_open += 1

    def _add_up(self) -> None:
        spans, self._spans = self._spans, []
        if self._on_gpu and spans:
            torch.cuda.current_stream().synchronize()
        for name, start, end in spans:
            self._seconds[name] = self._seconds.get(name, 0.0) + _seconds_between(start, end)
        marks = {id(mark): mark for _, *both in spans for mark in both}
        self._read_events += [mark for mark in marks.values() if not isinstance(mark, float)]

    def _mark(self, stream: torch.cuda.Stream | None = None) -> _Mark:
        if not self._on_gpu:
            return time.perf_counter()
        if not self._read_events:
            self._read_events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        event = self._read_events.pop()
        event.record(stream)
        return event


class PhaseTimer:
    """The phases of the tracer: spans within ``pop_rows``, whose rest is ``other``, and ``capture``."""

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self._enabled = enabled
        self._watch = Stopwatch(on_gpu=device.type == "cuda", enabled=enabled)
        self.span = self._watch.span
        self.phases = self._watch.phases

    def pop(self) -> dict[str, float]:
        """Seconds by phase since the last call, and start anew; empty when not enabled.

        ``grad_staging``, ``hessian_solve``, ``token_scoring``, ``score_aggregation``, ``other`` (the rest of
        pop_rows), ``pop_rows`` (the sum of those five, exactly), ``capture``, and the PARTS of phases.
        """
        spans = self._watch.pop()
        if not self._enabled:
            return {}
        seconds = {name: spans.get(name, 0.0) for name in (*PHASES, "other", "pop_rows", "capture", *PARTS)}
        parts = [seconds[phase] for phase in PHASES]
        seconds["other"] = max(0.0, seconds["pop_rows"] - sum(parts))
        seconds["pop_rows"] = sum([*parts, seconds["other"]])
        return seconds


def _seconds_between(start: _Mark, end: _Mark) -> float:
    if isinstance(start, float):
        assert isinstance(end, float)  # noqa: S101  (one stopwatch has marks of one kind)
        return end - start
    assert not isinstance(end, float)  # noqa: S101
    return float(start.elapsed_time(end)) / 1e3
