"""What tracing will take of a device's memory, from the model's shapes alone.

With F numbers a token, ``F = sum over modules of k_in + k_out``, and D numbers a response,
``D = sum of k_in k_out`` (`influence.layout.FactorLayout`), held until `pop_rows`:

    factors     F x (tokens + padding of each row to SLOT_ALIGNMENT) x bytes of the storage type
    gradients   rows x D x 4        (8 for a float64 model)
    signs       sum over modules of (k_in d_in + k_out d_out) x bytes of the storage type, the inputs' twice:
                modules with one input are projected by signs that lie together

and beside them while `pop_rows` runs the gathered gradients, M, the scores, and for G rows in groups of R,
M modules, of which those with the largest gradients have ``D_max`` numbers in all:

    hessian=response, identity    8 G (D + D_max) + 24 M G R + 2 G D x 4
    hessian=token                 of a batch of modules, D x D matrices and products over a row's tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn

from influence.config import TracerConfig
from influence.kernels import SLOT_ALIGNMENT
from influence.layout import FactorLayout, ShapeClass
from influence.micro_batch import response_dtype, storage_dtype
from influence.modules import TracedModule, find_modules
from influence.token_hessian import PRODUCT_BYTES, kept_matrices, modules_a_batch
from influence.weights import blocks_of_one_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one rank's device, in addition to the training's own."""

    bytes_per_token: int
    """Of the factors: what one more captured token takes."""
    factors_bytes: int
    gradients_bytes: int
    """Of the rows' ``G_r``."""
    signs_bytes: int
    """Of the projections; held as long as the tracer lives."""
    weights_bytes: int
    """Of M, a part of `pop_rows_bytes`."""
    pop_rows_bytes: int
    """The most that `pop_rows` takes beside what was captured."""

    @property
    def captured_bytes(self) -> int:
        """Held from the captures to `pop_rows`."""
        return self.factors_bytes + self.gradients_bytes + self.signs_bytes

    @property
    def total_bytes(self) -> int:
        """The peak."""
        return self.captured_bytes + self.pop_rows_bytes

    def __str__(self) -> str:
        """One line with the sums that a reader wants first, in MB."""
        captured, on_top, total = (
            f"{number / 1e6:,.3f} MB"
            for number in (self.captured_bytes, self.pop_rows_bytes, self.total_bytes)
        )
        return f"{self.bytes_per_token:,} bytes a token, {captured} captured + {on_top} in pop_rows = {total}"


def estimate_memory(
    model: nn.Module,
    config: TracerConfig,
    tokens: int,
    *,
    rows: int = 1,
    all_rows: int | None = None,
    responses_per_group: int = 16,
    dtype: torch.dtype | None = None,
) -> MemoryEstimate:
    """State in advance what tracing takes on a rank that captures `tokens` tokens between two `pop_rows`.

    `model` may be on any device, also on ``meta``. The tokens are those of `rows` responses, where the
    process group has `all_rows` in all (by default as many), in groups of `responses_per_group` (one
    group with ``scope=batch``) and of about equal length. `dtype` is what the traced layers compute in: by
    default the type of their weights; name it under autocast. A layer is taken to run once in a forward: one
    that runs n times makes the factors of all layers take n times as much.

    Raises TracerConfigError when `config.modules` names something that cannot be traced, ValueError for
    numbers that cannot be, and TypeError for what is no whole number or no floating type of torch.
    """
    all_rows = rows if all_rows is None else all_rows
    counts: tuple[object, ...] = (tokens, rows, all_rows, responses_per_group)
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, Integral):
            raise TypeError(f"expected whole numbers of tokens and rows, not {count!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is {dtype!r}; expected a floating type such as torch.bfloat16")
    if tokens < 0 or rows < 1 or all_rows < rows or responses_per_group < 1:
        raise ValueError(
            f"tokens={tokens}, rows={rows}, all_rows={all_rows}, responses_per_group={responses_per_group}: "
            "expected tokens >= 0, 1 <= rows <= all_rows, responses_per_group >= 1"
        )
    if config.max_tokens_per_response >= 0:
        tokens = min(tokens, rows * config.max_tokens_per_response)
    modules, _ = find_modules(model, config)
    layout = FactorLayout.of_shapes([module.shape for module in modules])
    weight_dtype = modules[0].module.weight.dtype
    stored = storage_dtype(dtype or weight_dtype).itemsize
    summed = response_dtype(weight_dtype).itemsize

    group_size = all_rows if config.scope == "batch" else min(responses_per_group, all_rows)
    # Groups lie anywhere: in the worst case each of the rank's rows is in another one.
    solved_rows = min(all_rows, rows * group_size)
    num_slots = tokens + rows * (SLOT_ALIGNMENT - 1)
    weights_bytes = rows * layout.gradient_dim * summed
    gathered_bytes = all_rows * layout.gradient_dim * summed
    if config.hessian == "token":
        solving_bytes = max(
            _token_solve_bytes(kind, group_size, -(-num_slots // rows), config.exclude_self)
            for kind in layout.classes
        )
    else:
        solving_bytes = _dual_solve_bytes(layout, solved_rows, group_size, summed)
    return MemoryEstimate(
        bytes_per_token=layout.num_factors * stored,
        factors_bytes=layout.num_factors * stored * num_slots,
        gradients_bytes=rows * layout.gradient_dim * summed,
        signs_bytes=sum(_num_signs(module) for module in modules) * stored,
        weights_bytes=weights_bytes,
        pop_rows_bytes=gathered_bytes + weights_bytes + solving_bytes + num_slots * summed,
    )


def _dual_solve_bytes(layout: FactorLayout, solved_rows: int, group_size: int, summed: int) -> int:
    """Of `influence.weights.solve_groups` where it takes most: when the last weights are formed."""
    largest = max(count * dim for _, count, dim in blocks_of_one_dim(layout))
    num_gram = len(layout.places) * solved_rows * group_size
    in_double = solved_rows * (layout.gradient_dim + largest) + 3 * num_gram
    return 8 * in_double + 2 * solved_rows * layout.gradient_dim * summed


def _token_solve_bytes(kind: ShapeClass, group_size: int, row_slots: int, exclude_self: bool) -> int:
    """Of `influence.token_hessian.solve_token_groups` for a batch of modules of this shape."""
    num_modules = modules_a_batch(kind)
    matrix_bytes = 8 * num_modules * kind.dim**2
    num_kept = min(group_size, kept_matrices(num_modules, kind.dim)) if exclude_self else 0
    # While H is formed: the Khatri-Rao product of a stretch of tokens, and the factors that it is made of.
    stretch = min(row_slots, PRODUCT_BYTES // (8 * num_modules * kind.dim))
    products = 8 * num_modules * stretch * (kind.dim + 2 * (kind.k_out + kind.k_in))
    forming = (1 + num_kept) * matrix_bytes + products
    # While it is solved: H, that with damping, and a factor; H less the response's own.
    gradients = 8 * num_modules * kind.dim * 2 * group_size
    solving = (3 + (1 if exclude_self else 0) + num_kept) * matrix_bytes + gradients
    return max(forming, solving)


def _num_signs(module: TracedModule) -> int:
    return 2 * module.k_in * module.width("in") + module.k_out * module.width("out")
