"""`response_gradients` for bfloat16 factors on a GPU.

A program adds up the outer products of a segment of a row's slots for one module, and a second launch adds
the segments of each row in order: enough programs to keep a GPU busy with the few rows of a micro-batch,
and the same sum every time.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from influence.kernels.gpu.places import class_places
from influence.kernels.plain import RowSlots
from influence.kernels.tiles import on_device
from influence.layout import FactorLayout

SEGMENT_SLOTS: Final = 1024


@triton.jit
def _segment_gradients_kernel(
    factors: tl.tensor,
    factors_stride: tl.tensor,
    segments: tl.tensor,
    places: tl.tensor,
    partial: tl.tensor,
    gradient_dim: tl.tensor,
    scale: tl.tensor,
    k_out: tl.constexpr,
    k_in: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    segment = tl.program_id(0)
    first = tl.multiple_of(tl.load(segments + 2 * segment), 16)
    # Up to the row's padding, which is zero, so that whether a number is read is the same for every 16.
    end = tl.cdiv(tl.load(segments + 2 * segment + 1), 16) * 16
    place = places + 4 * tl.program_id(1)
    num_blocks_i: tl.constexpr = (k_in + BLOCK_I - 1) // BLOCK_I
    o = (tl.program_id(2) // num_blocks_i) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = (tl.program_id(2) % num_blocks_i) * BLOCK_I + tl.arange(0, BLOCK_I)
    v_of = factors + (tl.load(place) + i).to(tl.int64)[:, None] * factors_stride
    u_of = factors + (tl.load(place + 1) + o).to(tl.int64)[:, None] * factors_stride
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for start in range(first, end, BLOCK_W):
        slot = tl.multiple_of(start, 16) + tl.arange(0, BLOCK_W)
        inside = (slot < end)[None, :]
        u_OW = tl.load(u_of + slot[None, :], mask=(o < k_out)[:, None] & inside, other=0.0)
        v_IW = tl.load(v_of + slot[None, :], mask=(i < k_in)[:, None] & inside, other=0.0)
        total = tl.dot(u_OW, tl.trans(v_IW), total)
    gradient = partial + segment.to(tl.int64) * gradient_dim + tl.load(place + 2)
    tl.store(
        gradient + o[:, None] * k_in + i[None, :],
        total * scale,
        mask=(o < k_out)[:, None] & (i < k_in)[None, :],
    )


@triton.jit
def _add_segments_kernel(
    partial: tl.tensor,
    segment_offsets: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    gradient_dim: tl.tensor,
    BLOCK_D: tl.constexpr,
) -> None:
    row = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    first = tl.load(segment_offsets + row)
    gradient = partial + first.to(tl.int64) * gradient_dim
    for _ in range(first, tl.load(segment_offsets + row + 1)):
        total += tl.load(gradient + d, mask=d < gradient_dim, other=0.0)
        gradient += gradient_dim
    tl.store(out + row.to(tl.int64) * out_stride + d, total.to(out.dtype.element_ty), mask=d < gradient_dim)


def response_gradients(
    factors_FW: Tensor,
    row_slots: RowSlots,
    layout: FactorLayout,
    out_RD: Tensor,
) -> None:
    """See `influence.kernels.response_gradients`."""
    if not row_slots:
        return
    segments, offsets = _segments(row_slots)
    table = on_device(np.concatenate([segments.reshape(-1), offsets]), factors_FW.device)
    segment_table, offset_table = table[: segments.size], table[segments.size :]
    partial = torch.empty((len(segments), layout.gradient_dim), dtype=torch.float32, device=factors_FW.device)
    for places in class_places(layout, factors_FW.device) if len(segments) else ():
        block_o, block_i = (min(128, max(16, triton.next_power_of_2(k))) for k in (places.k_out, places.k_in))
        num_blocks = triton.cdiv(places.k_out, block_o) * triton.cdiv(places.k_in, block_i)
        _segment_gradients_kernel[(len(segments), places.num_modules, num_blocks)](
            factors_FW,
            factors_FW.stride(0),
            segment_table,
            places.table,
            partial,
            layout.gradient_dim,
            places.scale,
            k_out=places.k_out,
            k_in=places.k_in,
            BLOCK_O=block_o,
            BLOCK_I=block_i,
            BLOCK_W=128,
            num_warps=4 if block_o * block_i > 256 else 1,
            num_stages=3,
        )
    _add_segments_kernel[(triton.cdiv(layout.gradient_dim, 512), len(row_slots))](
        partial, offset_table, out_RD, out_RD.stride(0), layout.gradient_dim, BLOCK_D=512, num_warps=4
    )


def _segments(
    row_slots: RowSlots,
) -> tuple[np.ndarray[Any, np.dtype[np.int32]], np.ndarray[Any, np.dtype[np.int32]]]:
    """int32 [S, 2] first and end slots of segments, and int32 [R + 1] offsets of the rows' segments."""
    first, end = np.array(row_slots, dtype=np.int32).reshape(-1, 2).T
    counts = -((first - end) // SEGMENT_SLOTS)
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    row = np.repeat(np.arange(counts.size), counts)
    start = first[row] + (np.arange(row.size) - offsets[row]) * SEGMENT_SLOTS
    return np.stack([start, np.minimum(start + SEGMENT_SLOTS, end[row])], axis=1).astype(np.int32), offsets
