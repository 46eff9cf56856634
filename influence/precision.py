"""Which types the tracer stores and adds up in, and float32 products that are float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def storage_dtype(computed: torch.dtype) -> torch.dtype:
    """The type in which a layer's projected inputs and gradients are kept, given what the layer computes in.

    bfloat16 stays, and so does float64; everything else (float16 could overflow in a sum over a
    layer's width) is kept in float32.
    """
    return computed if computed in (torch.bfloat16, torch.float64) else torch.float32


def sum_dtype(parameters: torch.dtype) -> torch.dtype:
    """The type in which gradients of responses and scores are added up, given the type of the weights."""
    return torch.float64 if parameters == torch.float64 else torch.float32


@contextmanager
def no_tf32() -> Iterator[None]:
    """Products of float32 tensors in float32, whatever the process allows elsewhere.

    TF32 would lose nothing on bfloat16 values, whose products it holds exactly, but 1e-3 on float32.
    """
    matmul: Any = torch.backends.cuda.matmul
    # torch 2.9 replaced the flag; mixing the two APIs makes torch's own getters raise.
    flag, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, flag)
    setattr(matmul, flag, exact)
    try:
        yield
    finally:
        setattr(matmul, flag, before)
