"""Rademacher projections that depend on a seed and a module's own name, and on nothing else.

Every rank, every retry and every machine draws the same matrix: the signs are the raw words of
Philox-4x64 (a counter-based generator whose raw stream NumPy keeps fixed across versions and
platforms), keyed by SHA-256 of (seed, canonical module name, side).
"""

from __future__ import annotations

import hashlib
from math import isqrt
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Side = Literal["in", "out"]

_WRAPPERS: Final = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "base_layer")
_DOMAIN: Final = "influence-projection-1"


def canonical_name(name: str) -> str:
    """A module's name without what FSDP, activation checkpointing, compile, DDP and PEFT put into it.

    >>> canonical_name("module._fsdp_wrapped_module.base_model.model.model.layers.0.q_proj.base_layer")
    'model.layers.0.q_proj'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[:1] == ["module"] or parts[:2] == ["base_model", "model"]:
        parts = parts[1:] if parts[0] == "module" else parts[2:]
    return ".".join(parts)


def projected_widths(d_in: int, d_out: int, factor: int, max_dim: int | None) -> tuple[int, int]:
    """(k_in, k_out) with ``k = max(1, width // factor)``, shrunk together until k_in k_out <= max_dim.

    None: no limit. Whole-number arithmetic, so that every platform agrees.
    """
    k_in, k_out = max(1, d_in // factor), max(1, d_out // factor)
    if max_dim is None or k_in * k_out <= max_dim:
        return k_in, k_out
    shrunk_in = max(1, isqrt(k_in * max_dim // k_out))
    shrunk_out = max(1, isqrt(k_out * max_dim // k_in))
    # Where one side is already 1, the other takes what is left.
    return min(shrunk_in, max_dim // min(shrunk_out, max_dim)), min(shrunk_out, max_dim)


def projection_signs(name: str, side: Side, width: int, k: int, seed: int) -> NDArray[np.int8]:
    """The signs (+1, -1) of the projection of one side of a module, int8 [k, width]."""
    key = hashlib.sha256(f"{_DOMAIN}\0{seed}\0{canonical_name(name)}\0{side}".encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(key[:16], "little"))
    words = np.asarray(generator.random_raw(-(-k * width // 64)), dtype="<u8")
    bits = np.unpackbits(words.view(np.uint8), count=k * width, bitorder="little")
    signs: NDArray[np.int8] = (1 - 2 * bits.astype(np.int8)).reshape(k, width)
    return signs


def projection_matrix(name: str, side: Side, width: int, k: int, seed: int) -> Tensor:
    """P = signs / sqrt(k), float64 [k, width] on the CPU: ``P_in`` (side "in") or ``P_out`` ("out").

    E[P^T P] = I, so inner products are kept in expectation, with variance of order 1/k. `name` may
    carry wrapper prefixes; they do not matter.
    """
    signs = torch.from_numpy(projection_signs(name, side, width, k, seed))
    return signs.to(torch.float64).mul_(float(k**-0.5))
