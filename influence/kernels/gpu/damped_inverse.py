"""`damped_inverse` on a GPU: a program inverts a system by Gauss-Jordan elimination in registers.

Symmetric positive definite systems need no pivoting, and the pivots are those of Cholesky's LDL^T, so one
that is not positive says that the system is not positive definite. A library's batched factorization of
a thousand systems of 16 takes longer than all else that is done with them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _damped_inverse_kernel(
    gram: tl.tensor,
    damping: tl.tensor,
    inverse: tl.tensor,
    failed: tl.tensor,
    num_rows: tl.tensor,
    BLOCK_R: tl.constexpr,
) -> None:
    system = tl.program_id(0)
    r = tl.arange(0, BLOCK_R)
    i, j = r[:, None], r[None, :]
    inside = (i < num_rows) & (j < num_rows)
    offsets = system.to(tl.int64) * num_rows * num_rows + i * num_rows + j
    strength = tl.load(damping + system)
    has_direction = strength > 0
    A = tl.load(gram + offsets, mask=inside, other=0.0)
    A += tl.where(i == j, tl.where(has_direction, strength, 1.0), 0.0)
    is_definite = has_direction
    for k in range(num_rows):
        column = tl.sum(tl.where(j == k, A, 0.0), axis=1)
        row = tl.sum(tl.where(i == k, A, 0.0), axis=0)
        pivot = tl.sum(tl.where(r == k, row, 0.0), axis=0)
        is_definite = is_definite & (pivot > 0)
        inverse_pivot = 1.0 / pivot
        scaled = row * inverse_pivot
        rest = A - column[:, None] * scaled[None, :]
        of_column = tl.where(i == k, inverse_pivot, -column[:, None] * inverse_pivot)
        A = tl.where(j == k, of_column, tl.where(i == k, scaled[None, :], rest))
    tl.store(inverse + offsets, tl.where(is_definite, A, 0.0), mask=inside)
    tl.store(failed + system, has_direction & (is_definite == 0))


def damped_inverse(gram_BRR: Tensor, damping_B: Tensor) -> tuple[Tensor, Tensor]:
    """See `influence.kernels.damped_inverse`; R <= 64."""
    num_systems, num_rows = gram_BRR.shape[:2]
    inverse = torch.empty(gram_BRR.shape, dtype=torch.float64, device=gram_BRR.device)
    failed = torch.empty(num_systems, dtype=torch.bool, device=gram_BRR.device)
    if num_systems and num_rows:
        block = max(4, triton.next_power_of_2(num_rows))
        _damped_inverse_kernel[(num_systems,)](
            gram_BRR.contiguous(),
            damping_B.contiguous(),
            inverse,
            failed,
            num_rows,
            BLOCK_R=block,
            num_warps={32: 2, 64: 8}.get(block, 1),
        )
    else:
        failed.zero_()
    return inverse, failed
