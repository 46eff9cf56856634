"""The state of a micro-batch while it is captured, shared by the hooks and the handle that its user holds."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import GradientEdge

from influence.layout import FactorLayout
from influence.micro_batch import FactorStore, storage_dtype
from influence.selection import TokenSelection


class CaptureError(RuntimeError):
    """What ran inside ``capture()`` cannot be traced rightly; the message names the layer or the row."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class LayerInput:
    """An input and the modules that were called with it, one after another."""

    seen: weakref.ref[Tensor]
    version: int
    is_recomputed: bool
    modules: range
    kept: Tensor | None
    """The input itself, where its projection waits for a gradient."""
    projected: range = range(0)
    """The modules whose rows of v hold its projection, in the factors of their call `number`."""
    number: int = 0

    def is_of(self, value: Tensor) -> bool:
        return self.seen() is value and self.version == value._version


@dataclass(slots=True, eq=False)
class LayerCall:
    """A call of a module that has a graph."""

    module: int
    input: LayerInput
    number: int | None = None
    """Of the factors that hold it; None until its input is projected."""


@dataclass(slots=True, eq=False)
class Recording:
    """What has been recorded so far, and what may still be."""

    selection: TokenSelection
    layout: FactorLayout
    gradient_scale: Tensor | None = None
    """float64 [R], CPU."""
    store: FactorStore | None = None
    edges: list[GradientEdge] = field(default_factory=list)
    """Of the outputs that have a graph."""
    num_forwards: int = 0
    is_open: bool = True
    is_sealed: bool = False
    """Nothing more is recorded."""
    is_discarded: bool = False
    _last_input: weakref.ref[LayerInput] | None = None

    def store_for(self, output: Tensor) -> FactorStore:
        """Where the factors go; their device and type are those of the first layer that runs."""
        if self.store is None:
            dtype = storage_dtype(output.dtype)
            self.store = FactorStore(self.selection, self.layout, output.device, dtype)
        return self.store

    def input_of(self, module: int, value: Tensor, is_recomputed: bool) -> LayerInput:
        """The input that a module is called with: that of the module before it when it is the very same."""
        last = self._last_input() if self._last_input is not None else None
        if (
            last is not None
            and last.is_of(value)
            and last.is_recomputed == is_recomputed
            and last.modules.stop == module
        ):
            last.modules = range(last.modules.start, module + 1)
            return last
        first = LayerInput(
            seen=weakref.ref(value),
            version=value._version,
            is_recomputed=is_recomputed,
            modules=range(module, module + 1),
            kept=value.detach() if is_recomputed else None,
        )
        # Weak, so that no input outlives the hooks on the outputs that were made of it.
        self._last_input = weakref.ref(first)
        return first

    def discard(self) -> None:
        """Drop what was recorded, and record nothing more."""
        self.is_discarded = self.is_sealed = True
        self.store = None

    def close(self) -> None:
        """End it; hooks that outlive it hold no graph and do nothing."""
        self.is_open, self.is_sealed = False, True
        self.edges.clear()
        self._last_input = None
