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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from influence.handle import GradientScale, MicroBatchCapture
from influence.layout import FactorLayout
from influence.micro_batch import FactorStore, MicroBatch
from influence.modules import TracedModule
from influence.projection import Side
from influence.recording import CaptureError, LayerCall, Recording
from influence.selection import select_tokens

__all__ = ["ActivationCapture", "CaptureError", "MicroBatchCapture"]


_RecordCall = Callable[[Recording, int, Any, Any], None]


class ForwardHook:
    """What hangs on a traced module. A copy of it, also a pickled one, is attached to nothing."""

    __slots__ = ("_capture", "_index", "_record")

    def __init__(
        self,
        capture: ActivationCapture | None = None,
        record: _RecordCall | None = None,
        index: int = 0,
    ) -> None:
        self._capture = capture
        self._record = record
        self._index = index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._capture is None or self._record is None:
            return
        recording = self._capture.recording
        if recording is not None:
            self._record(recording, self._index, args[0] if args else kwargs["input"], output)

    def __reduce__(self) -> tuple[type[ForwardHook], tuple[()]]:
        """A model that is copied or saved takes neither the tracer nor what it captured along."""
        return ForwardHook, ()


class ActivationCapture:
    """Owns the hooks on the traced modules and the micro-batches recorded since the last `clear`."""

    def __init__(
        self, modules: Sequence[TracedModule], dtype: torch.dtype, max_tokens_per_row: int = -1
    ) -> None:
        self._modules = tuple(modules)
        self.layout = FactorLayout.of_shapes([module.shape for module in modules])
        self._dtype = dtype
        self._max_tokens_per_row = max_tokens_per_row
        self._open: Recording | None = None
        self.micro_batches: list[MicroBatch] = []
        """Recorded since the last `clear`."""
        self._rows_seen: set[int] = set()
        self._shares_previous = [False] * len(self._modules)
        """By module: whether it was last called with the very input of the module before it."""
        self._stacked_signs: dict[tuple[range, torch.device, torch.dtype], Tensor] = {}
        # A compiled model is cut here: recording is nothing for its graph, nor for one of its own.
        record: _RecordCall = torch.compiler.disable(self._record_call)  # type: ignore[no-untyped-call]
        self._handles = [
            traced.module.register_forward_hook(ForwardHook(self, record, index), with_kwargs=True)
            for index, traced in enumerate(self._modules)
        ]

    @property
    def is_open(self) -> bool:
        return self._open is not None

    @property
    def recording(self) -> Recording | None:
        """That of the open micro-batch, if anything is to be recorded."""
        return None if self._open is None or self._open.is_discarded else self._open

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
        self, row_ids: Tensor, gradient_scale: GradientScale | None = None
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
        recording = Recording(selection, self.layout)
        micro_batch = MicroBatchCapture(recording)
        micro_batch.gradient_scale = gradient_scale
        self._open = recording
        try:
            yield micro_batch
        except BaseException:
            recording.store = None
            raise
        finally:
            self._open = None
            recording.close()
        if selection.row_ids and not recording.is_discarded:
            self.micro_batches.append(self._finish(recording))
            self._rows_seen.update(selection.row_ids)

    def _record_call(self, recording: Recording, index: int, value: Any, output: Any) -> None:
        self._check(index, value, "in", recording)
        self._check(index, output, "out", recording)
        recording.num_forwards += 1
        if not output.requires_grad:
            return  # no graph: the first forward of reentrant checkpointing, or an evaluation
        if recording.is_sealed:
            return  # the objective's gradient is there
        is_recomputed = torch._C._current_graph_task_id() != -1
        computed = _as_computed(output)
        if not is_recomputed:
            recording.edges.append(get_gradient_edge(computed))
        if not recording.selection.row_ids:
            return  # a rank without rows runs what the others run, for the gathers of its weights
        store = recording.store_for(output)
        if store.device != output.device:
            raise CaptureError(
                f"{self._modules[index].name} computes on {output.device}, layers before it on "
                f"{store.device}; a model on several devices is not supported"
            )
        shared = recording.input_of(index, value, is_recomputed)
        call = LayerCall(index, shared)
        if not is_recomputed:
            self._shares_previous[index] = shared.modules.start != index
            call.number = self._project_input(store, call, value, self._run_that_shares(index))
        computed.register_hook(partial(self._on_gradient, recording, call))  # type: ignore[no-untyped-call]

    def _on_gradient(self, recording: Recording, call: LayerCall, gradient: Tensor) -> None:
        store = recording.store
        if store is None or recording.is_sealed:
            return
        if call.number is None:
            kept = call.input.kept
            assert kept is not None  # noqa: S101  (a recomputed input is kept)
            call.number = self._project_input(store, call, kept, call.input.modules)
        signs = self._signs("out", range(call.module, call.module + 1), store)
        store.add_gradient(gradient, signs, call.module, call.number)

    def _project_input(self, store: FactorStore, call: LayerCall, value: Tensor, together: range) -> int:
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
        signs = [self._modules[module].signs(side, store.device, store.dtype) for module in modules]
        if len(signs) == 1:
            return signs[0]
        key = (modules, store.device, store.dtype)
        if key not in self._stacked_signs:
            self._stacked_signs[key] = torch.cat(signs)
        return self._stacked_signs[key]

    def _check(self, index: int, value: Any, side: Side, recording: Recording) -> None:
        traced = self._modules[index]
        if type(value) is not Tensor and not isinstance(value, nn.Parameter):
            raise CaptureError(
                f"{traced.name}: its {side}put is a {type(value).__name__}; "
                "tensor parallelism is not supported"
            )
        width, selection = traced.width(side), recording.selection
        if value.shape[-1] != width or not selection.is_grid(value.shape[:-1]):
            raise CaptureError(
                f"{traced.name}: its {side}put has shape {tuple(value.shape)} where row_ids asks for tokens "
                f"{selection.grid} of width {width}; row_ids must have the shape of the tokens the model "
                "sees, and layers that see a part of the tokens or of the width (experts, sequence or tensor "
                "parallelism) are not supported"
            )

    def _finish(self, recording: Recording) -> MicroBatch:
        store, recording.store = recording.store, None
        if not recording.num_forwards:
            raise CaptureError(
                "no traced layer ran inside capture(): the forward belongs inside, too; and where a model "
                "of this class was compiled before the tracer was made, call torch.compiler.reset() first"
            )
        everything = range(len(self._modules))
        silent = store.modules_without_gradient() if store is not None else everything
        if store is None or silent:
            raise CaptureError(
                f"no gradient reached {self._modules[silent[0]].name} ({len(silent)} of {len(everything)} "
                "traced layers) inside capture(): run the forward and the backward of the objective inside"
            )
        return store.finish(self._dtype, recording.gradient_scale)


def _as_computed(output: Tensor) -> Tensor:
    """The tensor by whose gradient a layer's output is known, whatever is written into the output later.

    A hook on a tensor sees the gradient of its value before any later write. Not so on a view, which a write
    moves to another place of the graph. A layer with a bias puts out a view, of what it computed with all
    tokens in one row.
    """
    base, node = output._base, output.grad_fn
    if base is None or base.grad_fn is None or node is None:
        return output
    is_reshaped = base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    is_next = len(node.next_functions) == 1 and node.next_functions[0][0] is base.grad_fn
    return base if is_reshaped and is_next else output
