"""`project` for bfloat16 factors on a GPU: one pass over the tokens that slots name."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _project_kernel(
    values: tl.tensor,
    signs: tl.tensor,
    source: tl.tensor,
    out: tl.tensor,
    values_stride: tl.tensor,
    signs_stride: tl.tensor,
    out_stride: tl.tensor,
    num_slots: tl.tensor,
    k: tl.tensor,
    width: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_X: tl.constexpr,
) -> None:
    slot = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    row = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    token = tl.load(source + slot, mask=slot < num_slots, other=-1)
    is_token = token >= 0
    values_of = values + token.to(tl.int64)[:, None] * values_stride
    signs_of = signs + row[:, None] * signs_stride
    total = tl.zeros((BLOCK_K, BLOCK_W), dtype=tl.float32)
    for start in range(0, width, BLOCK_X):
        x = start + tl.arange(0, BLOCK_X)
        if width % BLOCK_X == 0:
            value_WX = tl.load(values_of + x[None, :], mask=is_token[:, None], other=0.0)
            sign_KX = tl.load(signs_of + x[None, :], mask=(row < k)[:, None], other=0.0)
        else:
            inside = (x < width)[None, :]
            value_WX = tl.load(values_of + x[None, :], mask=is_token[:, None] & inside, other=0.0)
            sign_KX = tl.load(signs_of + x[None, :], mask=(row < k)[:, None] & inside, other=0.0)
        total = tl.dot(sign_KX, tl.trans(value_WX.to(tl.bfloat16)), total)
    tl.store(
        out + row.to(tl.int64)[:, None] * out_stride + slot[None, :],
        total.to(out.dtype.element_ty),
        mask=(row < k)[:, None] & (slot < num_slots)[None, :],
    )


def project(values_TX: Tensor, signs_KX: Tensor, source_W: Tensor, out_KW: Tensor) -> None:
    """See `influence.kernels.project`."""
    k, width = signs_KX.shape
    num_slots = source_W.shape[0]
    if not num_slots:
        return
    block_k = min(128, max(16, triton.next_power_of_2(k)))
    block_w, num_warps, num_stages = (64, 4, 5) if block_k <= 64 else (128, 8, 4)
    _project_kernel[(triton.cdiv(k, block_k), triton.cdiv(num_slots, block_w))](
        values_TX,
        signs_KX,
        source_W,
        out_KW,
        values_TX.stride(0),
        signs_KX.stride(0),
        out_KW.stride(0),
        num_slots,
        k,
        width=width,
        BLOCK_K=block_k,
        BLOCK_W=block_w,
        BLOCK_X=64,
        num_warps=num_warps,
        num_stages=num_stages,
    )
