"""How long things take, measured without changing what is measured.

On a GPU an event is recorded in the stream at each boundary and all are read once, at the end: there is
no synchronization per span. On the CPU the boundaries are `time.perf_counter`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("grad_staging", "hessian_solve", "token_scoring", "score_aggregation")
PARTS = ("all_gather", "copy_to_host")
"""Of phases, reported beside them: the first of ``grad_staging``, the second of ``score_aggregation``."""

_Mark = float | torch.cuda.Event


class Stopwatch:
    """Adds up the spans of each name until they are read. Does nothing when not enabled."""

    def __init__(self, *, on_gpu: bool, enabled: bool = True) -> None:
        self._on_gpu = on_gpu
        self._enabled = enabled
        self._spans: list[tuple[str, _Mark, _Mark]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count what runs inside as `name`; kept also when it raises."""
        if not self._enabled:
            yield
            return
        start = self._mark()
        try:
            yield
        finally:
            self._spans.append((name, start, self._mark()))

    def pop(self) -> dict[str, float]:
        """Seconds by name since the last call; names without a span are absent."""
        spans, self._spans = self._spans, []
        if self._on_gpu and spans:
            torch.cuda.current_stream().synchronize()
        seconds: dict[str, float] = {}
        for name, start, end in spans:
            seconds[name] = seconds.get(name, 0.0) + _seconds_between(start, end)
        return seconds

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class PhaseTimer:
    """The phases of the tracer: spans within ``pop_rows``, whose rest is ``other``, and ``capture``."""

    def __init__(self, device: torch.device, enabled: bool = True) -> None:
        self._enabled = enabled
        self._watch = Stopwatch(on_gpu=device.type == "cuda", enabled=enabled)
        self.span = self._watch.span

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
