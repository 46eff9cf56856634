"""Hooks that record, for every traced layer and captured token, the projected input and output gradient.

A forward hook projects a layer's input and hangs a hook on its *output*; when the gradient arrives there,
it is projected too and the pair is kept. So only a forward whose graph is really differentiated counts,
and both kinds of gradient checkpointing are right: reentrant checkpointing runs its first forward without
a graph, and the recomputed forward of the other kind is never differentiated. Each call of a layer has a
pair of its own. The hooks return nothing and add nothing to the model: gradients stay bitwise equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from influence.modules import TracedModule, by_shape


class CaptureError(RuntimeError):
    """What ran inside ``capture()`` cannot be traced rightly; the message names the layer or the row."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenSelection:
    """The captured tokens of a micro-batch, the tokens of a row together (T of them, R rows)."""

    num_tokens: int
    """Of the whole grid, captured or not."""
    row_ids: tuple[int, ...]
    """R ids, increasing."""
    row_offsets: tuple[int, ...]
    """R + 1 offsets into the T tokens."""
    token_index: Tensor
    """int64 [T], CPU: where the tokens lie in the flattened grid."""
    positions: Tensor
    """int64 [T], CPU: a token's index among its row's tokens before capping."""


@dataclass(frozen=True, slots=True, eq=False)
class CapturedClass:
    """What a micro-batch gave for the C modules of one shape (O = k_out, I = k_in); E calls of them in all.

    u and v are projected by signs alone; G carries the scale of both sides.
    """

    u: Tensor
    """[E, T, O], output gradients."""
    v: Tensor
    """[E, T, I], inputs."""
    module_of_call: tuple[int, ...]
    """E indices into the C modules."""
    gradients: Tensor
    """[C, R, O, I]: G of the R responses, in float32 (float64 for a float64 model)."""


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """The tokens of one ``capture()`` and what was recorded of them, by class of module shape."""

    selection: TokenSelection
    classes: tuple[CapturedClass, ...]


@dataclass(slots=True, eq=False)
class _OpenMicroBatch:
    selection: TokenSelection
    calls: list[list[tuple[Tensor, Tensor]]]
    """By module: the pairs (u_TO, v_TI) whose gradient has arrived."""
    num_forwards: int = 0
    is_open: bool = True
    _index_on: dict[torch.device, Tensor] = field(default_factory=dict)

    def index_on(self, device: torch.device) -> Tensor:
        if device not in self._index_on:
            self._index_on[device] = self.selection.token_index.to(device)
        return self._index_on[device]


def select_tokens(row_ids: Tensor, max_tokens_per_row: int = -1) -> TokenSelection:
    """Sort the captured tokens of a grid by row, and cap each row at n evenly spaced tokens.

    `row_ids` is an int64 grid (batch, seq), or (1, tokens) when packed, with the row of each token and -1
    where nothing is captured. Of a row's L > n tokens those at ``(2 i + 1) L // (2 n)`` are kept, the
    middles of n equal stretches. A grid on an accelerator is copied to the CPU, which waits for it.

    Raises ValueError for another type, another number of dimensions, or an id below -1.
    """
    if row_ids.dtype != torch.int64 or row_ids.dim() != 2:
        raise ValueError(
            f"row_ids must be an int64 grid (batch, seq) or (1, tokens), "
            f"not {row_ids.dtype} {tuple(row_ids.shape)}"
        )
    flat = row_ids.detach().reshape(-1).cpu()
    if flat.numel() and int(flat.min()) < -1:
        raise ValueError(f"row_ids holds {int(flat.min())}; ids are 0 or greater, and -1 is 'not captured'")
    index = (flat >= 0).nonzero().squeeze(1)
    index = index[torch.argsort(flat[index], stable=True)]
    ids, lengths = torch.unique_consecutive(flat[index], return_counts=True)
    starts = (lengths.cumsum(0) - lengths).tolist()
    kept, positions, offsets = [], [], [0]
    for start, length in zip(starts, lengths.tolist(), strict=True):
        position = _evenly_spaced(length, max_tokens_per_row)
        kept.append(index[start + position])
        positions.append(position)
        offsets.append(offsets[-1] + position.numel())
    empty = torch.empty(0, dtype=torch.int64)
    return TokenSelection(
        num_tokens=flat.numel(),
        row_ids=tuple(ids.tolist()),
        row_offsets=tuple(offsets),
        token_index=torch.cat([empty, *kept]),
        positions=torch.cat([empty, *positions]),
    )


def _evenly_spaced(length: int, most: int) -> Tensor:
    if most < 0 or length <= most:
        return torch.arange(length)
    return (2 * torch.arange(most) + 1) * length // (2 * most)


class ActivationCapture:
    """Owns the hooks on the traced modules and the micro-batches recorded since the last `clear`."""

    def __init__(
        self, modules: Sequence[TracedModule], dtype: torch.dtype, max_tokens_per_row: int = -1
    ) -> None:
        self._modules = tuple(modules)
        self._shape_classes = by_shape(modules)
        self._dtype = dtype
        self._max_tokens_per_row = max_tokens_per_row
        self._open: _OpenMicroBatch | None = None
        self.micro_batches: list[MicroBatch] = []
        """Recorded since the last `clear`."""
        self._rows_seen: set[int] = set()
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
    def record(self, row_ids: Tensor) -> Iterator[None]:
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
        micro_batch = self._open = _OpenMicroBatch(selection, [[] for _ in self._modules])
        try:
            yield
        finally:
            self._open, micro_batch.is_open = None, False
        if selection.row_ids:
            self.micro_batches.append(self._close(micro_batch))
            self._rows_seen.update(selection.row_ids)

    def _on_forward(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        micro_batch = self._open
        if micro_batch is None or not micro_batch.selection.row_ids:
            return
        self._check(index, args[0] if args else kwargs["input"], "in", micro_batch)
        self._check(index, output, "out", micro_batch)
        micro_batch.num_forwards += 1
        if not output.requires_grad:
            return  # no graph: the first forward of reentrant checkpointing, or an evaluation
        dtype = storage_dtype(output.dtype)
        signs = self._modules[index].signs("in", output.device, dtype)
        v_TI = _project(args[0] if args else kwargs["input"], signs, micro_batch)
        output.register_hook(partial(self._on_gradient, index, micro_batch, v_TI))

    def _on_gradient(self, index: int, micro_batch: _OpenMicroBatch, v_TI: Tensor, gradient: Tensor) -> None:
        if micro_batch.is_open:
            signs = self._modules[index].signs("out", v_TI.device, v_TI.dtype)
            micro_batch.calls[index].append((_project(gradient, signs, micro_batch), v_TI))

    def _check(self, index: int, value: Any, side: str, micro_batch: _OpenMicroBatch) -> None:
        traced = self._modules[index]
        width = traced.width("in" if side == "in" else "out")
        num_tokens = micro_batch.selection.num_tokens
        if type(value) is not Tensor and not isinstance(value, nn.Parameter):
            raise CaptureError(
                f"{traced.name}: its {side}put is a {type(value).__name__}; "
                "tensor parallelism is not supported"
            )
        if value.shape[-1] != width or value.numel() != num_tokens * width:
            raise CaptureError(
                f"{traced.name}: its {side}put has shape {tuple(value.shape)} where row_ids asks for "
                f"{num_tokens} tokens of width {width}; layers that see a part of the tokens or of the "
                "width (experts, sequence or tensor parallelism) are not supported"
            )

    def _close(self, micro_batch: _OpenMicroBatch) -> MicroBatch:
        silent = [m.name for m, calls in zip(self._modules, micro_batch.calls, strict=True) if not calls]
        if silent:
            if not micro_batch.num_forwards:
                raise CaptureError("no traced layer ran inside capture(): the forward belongs inside, too")
            raise CaptureError(
                f"no gradient reached {silent[0]} ({len(silent)} of {len(self._modules)} traced layers) "
                "inside capture(): run the forward and the backward of the objective inside"
            )
        return MicroBatch(
            micro_batch.selection,
            tuple(self._close_class(members, micro_batch) for members in self._shape_classes),
        )

    @torch.no_grad()
    def _close_class(self, members: list[int], micro_batch: _OpenMicroBatch) -> CapturedClass:
        calls = [(c, pair) for c, index in enumerate(members) for pair in micro_batch.calls[index]]
        module_of_call = tuple(c for c, _ in calls)
        u_ETO, v_ETI = (torch.stack([pair[side] for _, pair in calls]) for side in (0, 1))
        G_EROI = response_gradients(u_ETO, v_ETI, micro_batch.selection.row_offsets, self._dtype)
        G_CROI = G_EROI
        if module_of_call != tuple(range(len(members))):
            G_CROI = G_EROI.new_zeros(len(members), *G_EROI.shape[1:])
            G_CROI.index_add_(0, torch.tensor(module_of_call, device=G_EROI.device), G_EROI)
        scale = self._modules[members[0]].scale
        return CapturedClass(u_ETO, v_ETI, module_of_call, G_CROI.mul_(scale))


def storage_dtype(computed: torch.dtype) -> torch.dtype:
    """The type in which a layer's projected inputs and gradients are kept, given what the layer computes in.

    bfloat16 stays, and so does float64; everything else (float16 could overflow in a sum over a
    layer's width) is kept in float32.
    """
    return computed if computed in (torch.bfloat16, torch.float64) else torch.float32


def response_dtype(weights: torch.dtype) -> torch.dtype:
    """The type of ``G_r`` and of the scores: float32, for a float64 model float64."""
    return torch.float64 if weights == torch.float64 else torch.float32


@torch.no_grad()
def response_gradients(
    u_ETO: Tensor, v_ETI: Tensor, row_offsets: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """``G_r = sum_{t in r} u_t v_t^T`` of every call and row, [E, R, O, I] in `dtype`.

    Added up in float64, which no TF32 setting of the process can touch; the factors are small.
    """
    return torch.stack(
        [
            (u_ETO[:, start:end].double().mT @ v_ETI[:, start:end].double()).to(dtype)
            for start, end in pairwise(row_offsets)
        ],
        dim=1,
    )


@torch.no_grad()
def _project(values: Tensor, signs_KD: Tensor, micro_batch: _OpenMicroBatch) -> Tensor:
    """Project every token by signs and keep the captured ones, [T, K]."""
    with torch.autocast(values.device.type, enabled=False):
        flat = values.detach().reshape(-1, signs_KD.shape[1]).to(signs_KD.dtype)
        return (flat @ signs_KD.mT).index_select(0, micro_batch.index_on(values.device))
