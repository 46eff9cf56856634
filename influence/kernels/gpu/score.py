"""`score` for bfloat16 factors on a GPU.

A program scores a tile of a row's slots for all modules of one shape: it reads the factors once, keeps the
sum in registers, and adds it to what the shapes before gave. Small weights are multiplied number by
number in float32; wide ones on the tensor cores, each split into two bfloat16 numbers whose sum
carries 16 bits, so that the rounding of the factors is all that shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from influence.kernels.gpu.places import class_places
from influence.kernels.tiles import TILE_SLOTS, on_device
from influence.layout import FactorLayout


@triton.jit
def _score_small_kernel(
    chunks: tl.tensor,
    tiles: tl.tensor,
    weights: tl.tensor,
    is_finite: tl.tensor,
    places: tl.tensor,
    out: tl.tensor,
    weights_stride: tl.tensor,
    is_finite_stride: tl.tensor,
    num_modules: tl.tensor,
    k_out: tl.constexpr,
    k_in: tl.constexpr,
    TILE: tl.constexpr,
    SUBTILE: tl.constexpr,
) -> None:
    tile = tiles + 4 * (tl.program_id(0) // (TILE // SUBTILE))
    offset = (tl.program_id(0) % (TILE // SUBTILE)) * SUBTILE
    length = tl.load(tile + 2) - offset
    if length <= 0:
        return
    chunk = chunks + 3 * tl.load(tile)
    first = tl.multiple_of(tl.load(tile + 1), 16) + offset
    row = tl.load(tile + 3).to(tl.int64)
    slot = tl.arange(0, SUBTILE)
    # Up to the row's padding, which is zero, so that whether a number is read is the same for every 16.
    inside = slot < tl.cdiv(length, 16) * 16
    stride = tl.multiple_of(tl.load(chunk + 1), 16)
    factors = tl.multiple_of(tl.load(chunk).to(tl.pointer_type(tl.bfloat16)), 16) + first
    # The side with fewer numbers is kept in registers, the other is read number by number.
    few_is_v: tl.constexpr = k_in <= k_out
    num_few: tl.constexpr = k_in if few_is_v else k_out
    num_many: tl.constexpr = k_out if few_is_v else k_in
    few_place: tl.constexpr = 0 if few_is_v else 1
    few_step: tl.constexpr = 1 if few_is_v else k_in
    many_step: tl.constexpr = k_in if few_is_v else 1
    total = tl.zeros((SUBTILE,), dtype=tl.float32)
    for module in range(num_modules):
        place = places + 4 * module
        few_of = factors + tl.load(place + few_place) * stride
        many_of = factors + tl.load(place + (1 - few_place)) * stride
        M = weights + row * weights_stride + tl.load(place + 2)
        finite = tl.load(is_finite + row * is_finite_stride + tl.load(place + 3)) != 0
        few = ()
        for f in tl.static_range(num_few):
            few += (tl.load(few_of + f * stride + slot, mask=inside, other=0.0).to(tl.float32),)
        score = tl.zeros((SUBTILE,), dtype=tl.float32)
        for m in tl.static_range(num_many):
            many = tl.load(many_of + m * stride + slot, mask=inside, other=0.0).to(tl.float32)
            weighted = few[0] * tl.load(M + m * many_step)
            for f in tl.static_range(1, num_few):
                weighted += few[f] * tl.load(M + m * many_step + f * few_step)
            score += many * weighted
        # By selection: what is not finite would stay so in a product with zero.
        total += tl.where(finite, score, 0.0)
    at = out + tl.load(chunk + 2) + first + slot
    tl.store(at, tl.load(at, mask=inside) + total, mask=inside)


@triton.jit
def _score_wide_kernel(
    chunks: tl.tensor,
    tiles: tl.tensor,
    weights: tl.tensor,
    is_finite: tl.tensor,
    places: tl.tensor,
    out: tl.tensor,
    weights_stride: tl.tensor,
    is_finite_stride: tl.tensor,
    num_modules: tl.tensor,
    k_out: tl.constexpr,
    k_in: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    TILE: tl.constexpr,
    SUBTILE: tl.constexpr,
) -> None:
    tile = tiles + 4 * (tl.program_id(0) // (TILE // SUBTILE))
    offset = (tl.program_id(0) % (TILE // SUBTILE)) * SUBTILE
    length = tl.load(tile + 2) - offset
    if length <= 0:
        return
    chunk = chunks + 3 * tl.load(tile)
    first = tl.multiple_of(tl.load(tile + 1), 16) + offset
    row = tl.load(tile + 3).to(tl.int64)
    slot = tl.arange(0, SUBTILE)
    inside = slot < tl.cdiv(length, 16) * 16
    stride = tl.multiple_of(tl.load(chunk + 1), 16)
    factors = tl.multiple_of(tl.load(chunk).to(tl.pointer_type(tl.bfloat16)), 16) + first
    is_v_wider: tl.constexpr = k_in > k_out
    BLOCK_WIDE: tl.constexpr = BLOCK_I if is_v_wider else BLOCK_O
    total = tl.zeros((BLOCK_WIDE, SUBTILE), dtype=tl.float32)
    num_blocks: tl.constexpr = ((k_out + BLOCK_O - 1) // BLOCK_O) * ((k_in + BLOCK_I - 1) // BLOCK_I)
    num_blocks_i: tl.constexpr = (k_in + BLOCK_I - 1) // BLOCK_I
    for step in range(num_modules * num_blocks):
        place = places + 4 * (step // num_blocks)
        o = ((step % num_blocks) // num_blocks_i) * BLOCK_O + tl.arange(0, BLOCK_O)
        i = ((step % num_blocks) % num_blocks_i) * BLOCK_I + tl.arange(0, BLOCK_I)
        finite = tl.load(is_finite + row * is_finite_stride + tl.load(place + 3)) != 0
        v_IW = tl.load(
            factors + (tl.load(place) + i)[:, None] * stride + slot[None, :],
            mask=((i < k_in) & finite)[:, None] & inside[None, :],
            other=0.0,
        )
        u_OW = tl.load(
            factors + (tl.load(place + 1) + o)[:, None] * stride + slot[None, :],
            mask=((o < k_out) & finite)[:, None] & inside[None, :],
            other=0.0,
        )
        M = weights + row * weights_stride + tl.load(place + 2)
        if is_v_wider:
            weight = tl.load(
                M + o[None, :] * k_in + i[:, None],
                mask=(o < k_out)[None, :] & ((i < k_in) & finite)[:, None],
                other=0.0,
            )
        else:
            weight = tl.load(
                M + o[:, None] * k_in + i[None, :],
                mask=(o < k_out)[:, None] & ((i < k_in) & finite)[None, :],
                other=0.0,
            )
        high = weight.to(tl.bfloat16)
        low = (weight - high.to(tl.float32)).to(tl.bfloat16)
        narrow = u_OW if is_v_wider else v_IW
        wide = v_IW if is_v_wider else u_OW
        product = tl.dot(high, narrow, tl.dot(low, narrow))
        total += product * wide.to(tl.float32)
    at = out + tl.load(chunk + 2) + first + slot
    tl.store(at, tl.load(at, mask=inside) + tl.sum(total, axis=0), mask=inside)


def score(
    chunks: Sequence[Tensor],
    tiles: Tensor,
    weights_nD: Tensor,
    is_finite_nm: Tensor,
    layout: FactorLayout,
    out: Tensor,
    small_dim: int = 256,
    small_warps: int = 1,
    small_subtile: int = 256,
    wide_warps: int = 4,
    subtile: int = 128,
    num_stages: int = 2,
    max_narrow: int = 64,
    max_wide: int = 64,
    maxnreg: int | None = None,
) -> None:
    """See `influence.kernels.score`."""
    out.zero_()
    num_tiles = tiles.shape[0]
    if not num_tiles:
        return
    device = out.device
    chunk_table = on_device(_chunk_table(chunks), device)
    is_finite = is_finite_nm.view(torch.uint8)
    for places in class_places(layout, device):
        arguments = (
            chunk_table,
            tiles,
            weights_nD,
            is_finite,
            places.table,
            out,
            weights_nD.stride(0),
            is_finite.stride(0),
            places.num_modules,
        )
        k_out, k_in = places.k_out, places.k_in
        if k_out * k_in <= small_dim:
            _score_small_kernel[(num_tiles * (TILE_SLOTS // small_subtile),)](
                *arguments,
                k_out=k_out,
                k_in=k_in,
                TILE=TILE_SLOTS,
                SUBTILE=small_subtile,
                num_warps=small_warps,
                maxnreg=maxnreg,
            )
            continue
        block_o, block_i = (
            min(max_wide if is_wide else max_narrow, max(16, triton.next_power_of_2(k)))
            for k, is_wide in ((k_out, k_in <= k_out), (k_in, k_in > k_out))
        )
        _score_wide_kernel[(num_tiles * (TILE_SLOTS // subtile),)](
            *arguments,
            k_out=k_out,
            k_in=k_in,
            BLOCK_O=block_o,
            BLOCK_I=block_i,
            TILE=TILE_SLOTS,
            SUBTILE=subtile,
            num_warps=wide_warps,
            num_stages=num_stages,
        )


def _chunk_table(chunks: Sequence[Tensor]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """int64 [num_chunks, 3]: address, stride of a row, and where its scores start."""
    num_slots = np.array([chunk.shape[1] for chunk in chunks])
    table = np.empty((len(chunks), 3), dtype=np.int64)
    table[:, 0] = [chunk.data_ptr() for chunk in chunks]
    table[:, 1] = [chunk.stride(0) for chunk in chunks]
    table[:, 2] = num_slots.cumsum() - num_slots
    return table
