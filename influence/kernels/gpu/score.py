"""`score` for bfloat16 factors on a GPU.

A program scores a tile of a row's slots for some modules of one shape, with the sum in registers, so that
the factors are read once. The sums over the parts of the modules are added in a last launch. Small weights
are multiplied number by number in float32; wide ones on the tensor cores, each split into two bfloat16
numbers whose sum carries 16 bits, so that the rounding of the factors is all that shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from influence.kernels.gpu.places import ClassPlaces, class_places
from influence.kernels.tiles import SLOT_ALIGNMENT, TILE_SLOTS, on_device
from influence.layout import FactorLayout

MOST_FEW: Final = 8
MOST_SMALL_DIM: Final = 256
"""Weights with at most as many numbers, and few on one side, are multiplied number by number."""
MOST_UNROLLED_DIM: Final = 64
GROUP: Final = 7
"""Rows of the longer side that are read together, where all of it would not fit the instruction cache."""
ROWS_A_PART: Final = 600
"""Rows of factors that a program with small weights reads, about: as the programs of a launch that run at the
same time end at the same time, short ones leave a smaller part of the GPU idle at the end."""
WIDE_SLOTS: Final = 128
"""Slots of a program with wide weights; a part of a tile, since more would not fit the registers."""


@triton.jit
def _one_of_many(
    few: tl.tensor,
    many_of: tl.tensor,
    M: tl.tensor,
    m: tl.tensor,
    stride: tl.tensor,
    slot: tl.tensor,
    inside: tl.tensor,
    many_step: tl.constexpr,
    few_step: tl.constexpr,
) -> tl.tensor:
    many = tl.load(many_of + m * stride + slot, mask=inside, other=0.0)
    weighted = few[0] * tl.load(M + m * many_step)
    for f in tl.static_range(1, len(few)):
        weighted += few[f] * tl.load(M + m * many_step + f * few_step)
    return many.to(tl.float32) * weighted


@triton.jit
def _score_small_kernel(
    chunks: tl.tensor,
    tiles: tl.tensor,
    weights: tl.tensor,
    is_finite: tl.tensor,
    places: tl.tensor,
    partial: tl.tensor,
    partial_stride: tl.tensor,
    weights_stride: tl.tensor,
    is_finite_stride: tl.tensor,
    num_modules: tl.tensor,
    modules_a_part: tl.tensor,
    k_out: tl.constexpr,
    k_in: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    tile = tiles + 4 * tl.program_id(0)
    chunk = chunks + 3 * tl.load(tile)
    first = tl.multiple_of(tl.load(tile + 1), 16)
    row = tl.load(tile + 3).to(tl.int64)
    slot = tl.arange(0, TILE)
    # Up to the row's padding, which is zero, so that whether a number is read is the same for every 16.
    inside = slot < tl.cdiv(tl.load(tile + 2), 16) * 16
    stride = tl.multiple_of(tl.load(chunk + 1), 16)
    factors = tl.multiple_of(tl.load(chunk).to(tl.pointer_type(tl.bfloat16)), 16) + first
    # The side with fewer numbers is kept in registers, the other is read number by number.
    few_is_v: tl.constexpr = k_in <= k_out
    num_few: tl.constexpr = k_in if few_is_v else k_out
    num_many: tl.constexpr = k_out if few_is_v else k_in
    few_place: tl.constexpr = 0 if few_is_v else 1
    few_step: tl.constexpr = 1 if few_is_v else k_in
    many_step: tl.constexpr = k_in if few_is_v else 1
    total = tl.zeros((TILE,), dtype=tl.float32)
    part = tl.program_id(1)
    for module in range(part * modules_a_part, tl.minimum((part + 1) * modules_a_part, num_modules)):
        place = places + 4 * module
        few_of = factors + tl.load(place + few_place) * stride
        many_of = factors + tl.load(place + (1 - few_place)) * stride
        M = weights + row * weights_stride + tl.load(place + 2)
        finite = tl.load(is_finite + row * is_finite_stride + tl.load(place + 3)) != 0
        few = ()
        for f in tl.static_range(num_few):
            few += (tl.load(few_of + f * stride + slot, mask=inside, other=0.0).to(tl.float32),)
        score = tl.zeros((TILE,), dtype=tl.float32)
        for start in range(0, num_many // GROUP * GROUP, GROUP):
            for g in tl.static_range(GROUP):
                score += _one_of_many(few, many_of, M, start + g, stride, slot, inside, many_step, few_step)
        for m in tl.static_range(num_many // GROUP * GROUP, num_many):
            score += _one_of_many(few, many_of, M, m, stride, slot, inside, many_step, few_step)
        # By selection: what is not finite would stay so in a product with zero.
        total += tl.where(finite, score, 0.0)
    tl.store(partial + part * partial_stride + tl.load(chunk + 2) + first + slot, total, mask=inside)


@triton.jit
def _score_wide_kernel(
    chunks: tl.tensor,
    tiles: tl.tensor,
    weights: tl.tensor,
    is_finite: tl.tensor,
    places: tl.tensor,
    partial: tl.tensor,
    partial_stride: tl.tensor,
    weights_stride: tl.tensor,
    is_finite_stride: tl.tensor,
    num_modules: tl.tensor,
    k_out: tl.constexpr,
    k_in: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_NARROW: tl.constexpr,
    ALIGNMENT: tl.constexpr,
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
    k_wide: tl.constexpr = k_in if is_v_wider else k_out
    k_narrow: tl.constexpr = k_out if is_v_wider else k_in
    wide_step: tl.constexpr = 1 if is_v_wider else k_in
    narrow_step: tl.constexpr = k_in if is_v_wider else 1
    wide_place: tl.constexpr = 0 if is_v_wider else 1
    num_wide: tl.constexpr = (k_wide + BLOCK_WIDE - 1) // BLOCK_WIDE
    num_narrow: tl.constexpr = (k_narrow + BLOCK_NARROW - 1) // BLOCK_NARROW
    total = tl.zeros((BLOCK_WIDE, SUBTILE), dtype=tl.float32)
    for step in range(num_modules * num_narrow):
        place = places + 4 * (step // num_narrow)
        finite = tl.load(is_finite + row * is_finite_stride + tl.load(place + 3)) != 0
        n = (step % num_narrow) * BLOCK_NARROW + tl.arange(0, BLOCK_NARROW)
        narrow = tl.load(
            factors + (tl.load(place + (1 - wide_place)) + n)[:, None] * stride + slot[None, :],
            mask=((n < k_narrow) & finite)[:, None] & inside[None, :],
            other=0.0,
        )
        wide_of = factors + tl.load(place + wide_place) * stride
        M = weights + row * weights_stride + tl.multiple_of(tl.load(place + 2), ALIGNMENT)
        for block in tl.range(num_wide, num_stages=3):
            w = block * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
            wide = tl.load(
                wide_of + w[:, None] * stride + slot[None, :],
                mask=((w < k_wide) & finite)[:, None] & inside[None, :],
                other=0.0,
            )
            weight = tl.load(
                M + w[:, None] * wide_step + n[None, :] * narrow_step,
                mask=((w < k_wide) & finite)[:, None] & (n < k_narrow)[None, :],
                other=0.0,
            )
            high = weight.to(tl.bfloat16)
            low = (weight - high.to(tl.float32)).to(tl.bfloat16)
            total += tl.dot(high, narrow, tl.dot(low, narrow)) * wide.to(tl.float32)
    tl.store(partial + tl.load(chunk + 2) + first + slot, tl.sum(total, axis=0), mask=inside)


def score(
    chunks: Sequence[Tensor],
    tiles: Tensor,
    weights_nD: Tensor,
    is_finite_nm: Tensor,
    layout: FactorLayout,
    out: Tensor,
) -> None:
    """See `influence.kernels.score`; sums in float32.

    Raises ValueError for chunks whose rows do not start at multiples of 16 numbers.
    """
    num_tiles = tiles.shape[0]
    if not num_tiles:
        out.zero_()
        return
    chunk_table = on_device(_chunk_table(chunks), out.device)
    is_finite = is_finite_nm.view(torch.uint8)
    weights_nD = weights_nD.to(torch.float32)
    classes = class_places(layout, out.device)
    parts = [_num_parts(places) for places in classes]
    partial = torch.zeros((sum(parts), out.shape[0]), dtype=torch.float32, device=out.device)
    for places, num_parts, of_class in zip(classes, parts, torch.split(partial, parts), strict=True):
        k_out, k_in, num_modules = places.k_out, places.k_in, places.num_modules
        arguments = (
            chunk_table,
            tiles,
            weights_nD,
            is_finite,
            places.table,
            of_class,
            of_class.stride(0),
            weights_nD.stride(0),
            is_finite.stride(0),
            num_modules,
        )
        if _is_small(places):
            _score_small_kernel[(num_tiles, num_parts)](
                *arguments,
                triton.cdiv(num_modules, num_parts),
                k_out=k_out,
                k_in=k_in,
                TILE=TILE_SLOTS,
                GROUP=GROUP if k_out * k_in > MOST_UNROLLED_DIM else max(k_out, k_in),
                num_warps=1,
            )
        else:
            block_narrow = min(64, max(16, triton.next_power_of_2(min(k_out, k_in))))
            block_wide = min(64, 2 * block_narrow, max(16, triton.next_power_of_2(max(k_out, k_in))))
            _score_wide_kernel[(num_tiles * (TILE_SLOTS // WIDE_SLOTS),)](
                *arguments,
                k_out=k_out,
                k_in=k_in,
                BLOCK_WIDE=block_wide,
                BLOCK_NARROW=block_narrow,
                ALIGNMENT=places.alignment,
                TILE=TILE_SLOTS,
                SUBTILE=WIDE_SLOTS,
                num_warps=4,
            )
    torch.sum(partial, dim=0, dtype=out.dtype, out=out)


def _is_small(places: ClassPlaces) -> bool:
    return min(places.k_out, places.k_in) <= MOST_FEW and places.k_out * places.k_in <= MOST_SMALL_DIM


def _num_parts(places: ClassPlaces) -> int:
    """Into how many programs a tile's modules go."""
    if not _is_small(places):
        return 1
    modules_a_part = max(1, ROWS_A_PART // (places.k_out + places.k_in))
    return -(-places.num_modules // modules_a_part)


def _chunk_table(chunks: Sequence[Tensor]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """int64 [num_chunks, 3]: address, stride of a row, and where its scores start."""
    num_slots = np.array([chunk.shape[1] for chunk in chunks])
    table = np.empty((len(chunks), 3), dtype=np.int64)
    table[:, 0] = [chunk.data_ptr() for chunk in chunks]
    table[:, 1] = [chunk.stride(0) for chunk in chunks]
    table[:, 2] = num_slots.cumsum() - num_slots
    if (table[num_slots > 0, :2] % SLOT_ALIGNMENT).any():
        raise ValueError(f"the rows of factors must start at multiples of {SLOT_ALIGNMENT} numbers")
    return table
