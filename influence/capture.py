"""Hooks that record, for every traced layer and captured token, the projected input and output gradient.

A forward hook takes a layer's input and hangs a hook on its *output*; when the gradient arrives there, the
pair counts. So only a forward whose graph is really differentiated counts, and both kinds of gradient
checkpointing are right: with the reentrant kind the first forward has no graph, and with the other kind it
is the first forward that is differentiated and the recomputed one that is not. Each is projected once: an
ordinary forward projects its inputs as they come, a recomputation (a forward inside a backward) only keeps a
reference and projects when a gradient asks for it. The hooks return nothing and add nothing to the model:
gradients stay bitwise equal.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from influence.layout import FactorLayout
from influence.micro_batch import FactorStore, MicroBatch, storage_dtype
from influence.modules import TracedModule
from influence.projection import Side
from influence.roots import first_edges
from influence.selection import TokenSelection, select_tokens


class CaptureError(RuntimeError):
    """What ran inside ``capture()`` cannot be traced rightly; the message names the layer or the row."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Input:
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
class _Call:
    """A call of a module that has a graph."""

    module: int
    input: _Input
    number: int | None = None
    """Of the factors that hold it; None until its input is projected."""


class MicroBatchCapture:
    """A micro-batch while it is captured: what ``with tracer.capture(row_ids) as micro_batch`` gives."""

    def __init__(self, selection: TokenSelection, layout: FactorLayout) -> None:
        self._selection = selection
        self._layout = layout
        self._gradient_scale: Tensor | None = None
        self._edges: list[GradientEdge] = []
        self._store: FactorStore | None = None
        self._last_input: weakref.ref[_Input] | None = None
        self._num_forwards = 0
        self._is_open = True
        self._is_sealed = False
        """Nothing more is recorded."""
        self._is_discarded = False

    @property
    def row_ids(self) -> tuple[int, ...]:
        """The captured rows, increasing."""
        return self._selection.row_ids

    @property
    def gradient_scale(self) -> Tensor | None:
        """float64 [R], or None: what a row's captured gradients are multiplied by.

        For an objective whose gradient is that of the loss which runs anyway, times a number for each row.
        Set it, until the block ends, to a mapping from row id to number, or to one number a row by
        increasing row id.

        Raises ValueError where a row has no number or one that is not finite.
        """
        return self._gradient_scale

    @gradient_scale.setter
    def gradient_scale(self, scale: Mapping[int, float] | Sequence[float] | Tensor | None) -> None:
        self._check_open()
        self._gradient_scale = None if scale is None else _scale_of_rows(scale, self.row_ids)

    @property
    def roots(self) -> list[GradientEdge]:
        """By what to differentiate the objective, so that all traced outputs get a gradient and no weight.

        To be passed to `torch.autograd.grad` as inputs, after the forward: see `backward`.
        """
        self._check_open()
        if not self._edges:
            raise CaptureError(
                "the traced layers have no graph before the backward: run the forward inside capture(), and "
                "use_reentrant=False where it is checkpointed"
            )
        return first_edges(self._edges)

    def backward(self, objective: Tensor, retain_graph: bool = False) -> None:
        """Capture the gradients of `objective`; compute none of a weight, and leave every ``.grad`` alone.

        What other backward passes send through the same layers is not recorded from then on, so that with
        ``retain_graph=True`` a training loss can share the forward: run its backward afterwards.

        Raises CaptureError before a forward, and with reentrant checkpointing, which cannot do this.
        """
        roots = self.roots
        self._is_sealed = self._is_discarded
        try:
            torch.autograd.grad(objective, roots, retain_graph=retain_graph, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise CaptureError(
                    "backward() of a micro-batch cannot pass reentrant checkpoints; use use_reentrant=False"
                ) from error
            raise
        finally:
            self._is_sealed = True

    def discard(self) -> None:
        """Drop what was recorded and record nothing more; the rows can be captured again afterwards."""
        self._check_open()
        self._is_discarded = self._is_sealed = True
        self._store = None

    def _check_open(self) -> None:
        if not self._is_open:
            raise CaptureError("this micro-batch is captured; set and use it inside its capture()")

    def _store_for(self, output: Tensor) -> FactorStore:
        if self._store is None:
            self._store = FactorStore(self._selection, self._layout, output.device)
        if self._store.dtype is None:
            self._store.dtype = storage_dtype(output.dtype)
        return self._store

    def _input_of(self, module: int, value: Tensor, is_recomputed: bool) -> _Input:
        last = self._last_input() if self._last_input is not None else None
        if (
            last is not None
            and last.is_of(value)
            and last.is_recomputed == is_recomputed
            and last.modules.stop == module
        ):
            last.modules = range(last.modules.start, module + 1)
            return last
        first = _Input(
            weakref.ref(value),
            value._version,
            is_recomputed,
            range(module, module + 1),
            value.detach() if is_recomputed else None,
        )
        # Weak, so that no input outlives the hooks on the outputs that were made of it.
        self._last_input = weakref.ref(first)
        return first

    def _close(self) -> None:
        self._is_open, self._is_sealed = False, True
        self._edges.clear()
        self._last_input = None


class ActivationCapture:
    """Owns the hooks on the traced modules and the micro-batches recorded since the last `clear`."""

    def __init__(
        self, modules: Sequence[TracedModule], dtype: torch.dtype, max_tokens_per_row: int = -1
    ) -> None:
        self._modules = tuple(modules)
        self.layout = FactorLayout.of_shapes([module.shape for module in modules])
        self._dtype = dtype
        self._max_tokens_per_row = max_tokens_per_row
        self._open: MicroBatchCapture | None = None
        self.micro_batches: list[MicroBatch] = []
        """Recorded since the last `clear`."""
        self._rows_seen: set[int] = set()
        self._shares_previous = [False] * len(self._modules)
        """By module: whether it was last called with the very input of the module before it."""
        self._stacked_signs: dict[tuple[range, torch.device, torch.dtype], Tensor] = {}
        self._handles = [
            traced.module.register_forward_hook(partial(self._on_forward, index), with_kwargs=True)
            for index, traced in enumerate(self._modules)
        ]

    @property
    def is_open(self) -> bool:
        return self._open is not None

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forget the micro-batches."""
        self.micro_batches = []
        self._rows_seen.clear()

    @contextmanager
    def record(
        self, row_ids: Tensor, gradient_scale: Mapping[int, float] | Sequence[float] | Tensor | None = None
    ) -> Iterator[MicroBatchCapture]:
        """Record the forward and backward that run inside; nothing is kept when they raise.

        Raises CaptureError, ValueError: see `InfluenceTracer.capture`.
        """
        if self._open is not None:
            raise CaptureError("capture() inside capture(): a micro-batch is captured by itself")
        if not self._handles:
            raise CaptureError("the tracer was removed from the model")
        selection = select_tokens(row_ids, self._max_tokens_per_row)
        repeated = self._rows_seen.intersection(selection.row_ids)
        if repeated:
            raise CaptureError(f"row {min(repeated)} was captured before; call pop_rows() between updates")
        micro_batch = MicroBatchCapture(selection, self.layout)
        micro_batch.gradient_scale = gradient_scale
        self._open = micro_batch
        try:
            yield micro_batch
        except BaseException:
            micro_batch._store = None
            raise
        finally:
            self._open = None
            micro_batch._close()
        if selection.row_ids and not micro_batch._is_discarded:
            self.micro_batches.append(self._finish(micro_batch))
            self._rows_seen.update(selection.row_ids)

    def _on_forward(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        micro_batch = self._open
        if micro_batch is None or micro_batch._is_discarded:
            return
        value = args[0] if args else kwargs["input"]
        self._check(index, value, "in", micro_batch)
        self._check(index, output, "out", micro_batch)
        micro_batch._num_forwards += 1
        if not output.requires_grad:
            return  # no graph: the first forward of reentrant checkpointing, or an evaluation
        if micro_batch._is_sealed:
            return  # the objective's gradient is there
        is_recomputed = torch._C._current_graph_task_id() != -1
        if not is_recomputed:
            micro_batch._edges.append(get_gradient_edge(output))
        if not micro_batch.row_ids:
            return  # a rank without rows runs what the others run, for the gathers of its weights
        store = micro_batch._store_for(output)
        if store.device != output.device:
            raise CaptureError(
                f"{self._modules[index].name} computes on {output.device}, layers before it on "
                f"{store.device}; a model on several devices is not supported"
            )
        shared = micro_batch._input_of(index, value, is_recomputed)
        call = _Call(index, shared)
        if not is_recomputed:
            self._shares_previous[index] = shared.modules.start != index
            call.number = self._project_input(store, call, value, self._run_that_shares(index))
        output.register_hook(partial(self._on_gradient, micro_batch, call))

    def _on_gradient(self, micro_batch: MicroBatchCapture, call: _Call, gradient: Tensor) -> None:
        store = micro_batch._store
        if store is None or micro_batch._is_sealed:
            return
        if call.number is None:
            kept = call.input.kept
            assert kept is not None  # noqa: S101  (a recomputed input is kept)
            call.number = self._project_input(store, call, kept, call.input.modules)
        signs = self._signs("out", range(call.module, call.module + 1), store)
        store.add_gradient(gradient, signs, call.module, call.number)

    def _project_input(self, store: FactorStore, call: _Call, value: Tensor, together: range) -> int:
        """Project the input of a call unless that has been done; `together`: modules likely to share it."""
        number, shared = store.next_call(call.module), call.input
        if call.module not in shared.projected or shared.number != number:
            start, stop = call.module, call.module + 1
            if shared.number == number and shared.projected.stop == call.module:
                # Once more for those before it: a product has the same rounding whenever it is made.
                start = shared.projected.start
            while start > together.start and store.next_call(start - 1) == number:
                start -= 1
            while stop < together.stop and store.next_call(stop) == number:
                stop += 1
            shared.projected, shared.number = range(start, stop), number
            store.add_inputs(value, self._signs("in", shared.projected, store), shared.projected, number)
        return store.take(call.module)

    def _run_that_shares(self, index: int) -> range:
        """A module and those after it that had its input when they were called last."""
        stop = index + 1
        while stop < len(self._modules) and self._shares_previous[stop]:
            stop += 1
        return range(index, stop)

    def _signs(self, side: Side, modules: range, store: FactorStore) -> Tensor:
        assert store.dtype is not None  # noqa: S101  (set by the first forward)
        signs = [self._modules[module].signs(side, store.device, store.dtype) for module in modules]
        if len(signs) == 1:
            return signs[0]
        key = (modules, store.device, store.dtype)
        if key not in self._stacked_signs:
            self._stacked_signs[key] = torch.cat(signs)
        return self._stacked_signs[key]

    def _check(self, index: int, value: Any, side: Side, micro_batch: MicroBatchCapture) -> None:
        traced = self._modules[index]
        if type(value) is not Tensor and not isinstance(value, nn.Parameter):
            raise CaptureError(
                f"{traced.name}: its {side}put is a {type(value).__name__}; "
                "tensor parallelism is not supported"
            )
        width, selection = traced.width(side), micro_batch._selection
        if value.shape[-1] != width or not selection.is_grid(value.shape[:-1]):
            raise CaptureError(
                f"{traced.name}: its {side}put has shape {tuple(value.shape)} where row_ids asks for tokens "
                f"{selection.grid} of width {width}; layers that see a part of the tokens or of the "
                "width (experts, sequence or tensor parallelism) are not supported"
            )

    def _finish(self, micro_batch: MicroBatchCapture) -> MicroBatch:
        store, micro_batch._store = micro_batch._store, None
        if not micro_batch._num_forwards:
            raise CaptureError("no traced layer ran inside capture(): the forward belongs inside, too")
        everything = range(len(self._modules))
        silent = store.modules_without_gradient() if store is not None else everything
        if store is None or silent:
            raise CaptureError(
                f"no gradient reached {self._modules[silent[0]].name} ({len(silent)} of {len(everything)} "
                "traced layers) inside capture(): run the forward and the backward of the objective inside"
            )
        return store.finish(self._dtype, micro_batch.gradient_scale)


def _scale_of_rows(scale: Mapping[int, float] | Sequence[float] | Tensor, row_ids: tuple[int, ...]) -> Tensor:
    if isinstance(scale, Mapping):
        absent = [row_id for row_id in row_ids if row_id not in scale]
        if absent:
            raise ValueError(f"gradient_scale has no number for row {absent[0]}")
        scale = [float(scale[row_id]) for row_id in row_ids]
    scale_R = torch.as_tensor(scale, dtype=torch.float64).detach().to("cpu", copy=True)
    if scale_R.shape != (len(row_ids),):
        raise ValueError(
            f"gradient_scale has shape {tuple(scale_R.shape)} where {len(row_ids)} rows are captured; "
            "give one number a row"
        )
    bad = (~scale_R.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"gradient_scale of row {row_ids[bad[0]]} is {float(scale_R[bad[0]])}")
    return scale_R
