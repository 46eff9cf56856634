"""How often the host waits for the device while rows are popped: counted, not timed.

On the CPU nothing waits, so what would make a GPU's host wait is counted where it is asked for: a
tensor turned into a number, a list or an array of the host, a copy to the CPU, a mask turned into indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import influence.tracer as tracer_module
from influence import InfluenceTracer, TracerConfig, kernels
from influence.staging import HostCopy
from tests.influence.tiny_model import TinyTransformer, make_responses, padded
from tests.influence.tracing import capture

CONFIG = TracerConfig(projection_dim_factor=2)
RESPONSES = make_responses(num_responses=8, num_groups=2)
_ON_HOST = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
_WAITING_OPS = (torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten.unique_dim)


class _Waits(TorchDispatchMode):
    """What would make the host wait, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.is_counting = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masks or func.overloadpacket in _WAITING_OPS:
            self.note(str(func))
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        if self.is_counting:
            self.seen.append(name)


@contextmanager
def counted_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Waits]:
    """Counts everywhere but in the products, whose references for the CPU loop over rows."""
    waits = _Waits()

    def counting(name: str, ordinary: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            waits.note(name)
            return ordinary(self, *args, **kwargs)

        return method

    def not_counting(ordinary: Callable[..., Any]) -> Callable[..., Any]:
        def product(*args: Any, **kwargs: Any) -> Any:
            waits.is_counting = False
            try:
                return ordinary(*args, **kwargs)
            finally:
                waits.is_counting = True

        return product

    with monkeypatch.context() as patch:
        for name in _ON_HOST:
            patch.setattr(Tensor, name, counting(name, getattr(Tensor, name)))
        for name in ("project", "response_gradients", "score"):
            patch.setattr(kernels, name, not_counting(getattr(kernels, name)))
        with waits:
            yield waits


def pop(tracer: InfluenceTracer) -> None:
    tracer.pop_rows([r.group for r in RESPONSES], [r.contrast for r in RESPONSES])


@pytest.mark.parametrize("num_micro_batches", [1, 4, 8])
@pytest.mark.parametrize("hessian", ["response", "identity"])
def test_popping_rows_waits_twice_whatever_their_number(
    hessian: str, num_micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TinyTransformer()
    tracer = InfluenceTracer(model, replace(CONFIG, hessian=hessian))
    size = len(RESPONSES) // num_micro_batches
    # From the last to the first, so that the rows have to be put in order, too.
    for start in reversed(range(0, len(RESPONSES), size)):
        capture(tracer, model, padded(RESPONSES[start : start + size]))
    with counted_waits(monkeypatch) as waits:
        pop(tracer)
    # The totals and counts of the solve, and the scores.
    assert waits.seen == ["tolist", "cpu"]


def test_closing_a_micro_batch_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = TinyTransformer(), padded(RESPONSES)
    tracer = InfluenceTracer(model, CONFIG)
    capture(tracer, model, batch)
    pop(tracer)
    with counted_waits(monkeypatch) as waits:
        capture(tracer, model, batch)
    # The row ids, which are on the CPU already where the caller follows the advice.
    assert [name for name in waits.seen if name not in ("cpu", "numpy")] == []
    assert waits.seen.count("cpu") == waits.seen.count("numpy") == 1


def test_what_is_brought_to_the_host_is_brought_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TinyTransformer()
    tracer = InfluenceTracer(model, CONFIG)
    for response in RESPONSES:
        capture(tracer, model, padded([response]))
    copied: list[Tensor] = []

    class Copy(HostCopy):
        def __init__(self, source: Tensor) -> None:
            super().__init__(source)
            copied.append(self.tensor)

    monkeypatch.setattr(tracer_module, "HostCopy", Copy)
    rows = tracer.pop_rows([r.group for r in RESPONSES], [r.contrast for r in RESPONSES])
    (scores,) = copied
    assert {row.scores.untyped_storage().data_ptr() for row in rows} == {scores.untyped_storage().data_ptr()}
