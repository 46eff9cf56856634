"""Seconds by name, measured without making a GPU wait: events in the stream, read once at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_Mark = float | torch.cuda.Event


class Stopwatch:
    """Adds up the spans of each name until they are read."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._spans: list[tuple[str, _Mark, _Mark]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count what runs inside as ``name``."""
        start = self._mark()
        yield
        self._spans.append((name, start, self._mark()))

    def pop(self) -> dict[str, float]:
        """Seconds by name since the last call."""
        spans, self._spans = self._spans, []
        if self._on_gpu and spans:
            torch.cuda.current_stream().synchronize()
        seconds: dict[str, float] = {}
        for name, start, end in spans:
            seconds[name] = seconds.get(name, 0.0) + _between(start, end)
        return seconds

    def _mark(self) -> _Mark:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(start: _Mark, end: _Mark) -> float:
    if isinstance(start, float):
        assert isinstance(end, float)  # noqa: S101  (one stopwatch has marks of one kind)
        return end - start
    assert not isinstance(end, float)  # noqa: S101
    return float(start.elapsed_time(end)) / 1e3
