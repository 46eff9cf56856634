"""Scores as float16 with one float32 scale a row: half the bytes, no overflow, nothing lost to zero.

Each row is divided by a power of two that brings its largest magnitude into [2^14, 2^15); so the division
is exact, the largest float16 (65504) is never reached, and a score is rounded to 11 significant bits down
to 2^-29 of the row's largest. Smaller ones keep fewer bits; one that would round to zero keeps its sign at
float16's smallest magnitude instead.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from influence.rundir.arrays import Float32, Int64

Float16 = npt.NDArray[np.float16]

_HALF_BITS = 11  # significant ones of a float16
_TOP_EXPONENT = 14
_MIN_SCALE_EXPONENT = -126  # of float32's normal numbers
_MAX_SCALE_EXPONENT = 127 - _TOP_EXPONENT  # there, rounding up to 2^15 would be float32's 2^128
_LARGEST_BELOW_TOP = np.float16(2**15 - 2**4)
_SMALLEST_HALF = np.finfo(np.float16).smallest_subnormal


def to_half(scores_T: Float32, row_offsets: Int64) -> tuple[Float16, Float32]:
    """Scores [T] as float16 [T] and scales [R], powers of two; NaN and infinities stay what they are."""
    lengths = np.diff(row_offsets)
    largest = np.zeros(len(lengths), dtype=np.float32)
    filled = lengths > 0
    if filled.any():
        magnitudes = np.where(np.isfinite(scores_T), np.abs(scores_T), np.float32(0))
        largest[filled] = np.maximum.reduceat(magnitudes, row_offsets[:-1][filled])
    mantissas, exponents = np.frexp(largest)  # largest = m * 2^exponent with m in [0.5, 1)
    # What rounds up to the next power of two counts as that: stored again, the row has the same bytes.
    exponents += np.rint(mantissas * 2**_HALF_BITS) == 2**_HALF_BITS
    exponents = np.clip(exponents - 1 - _TOP_EXPONENT, _MIN_SCALE_EXPONENT, _MAX_SCALE_EXPONENT)
    exponents[largest == 0] = 0
    scale = np.ldexp(np.float32(1), exponents).astype(np.float32)
    scaled = np.ldexp(scores_T, np.repeat(-exponents, lengths))
    halves = scaled.astype(np.float16)
    at_the_end = np.repeat(exponents == _MAX_SCALE_EXPONENT, lengths) & np.isfinite(scores_T)
    halves[at_the_end] = np.clip(halves[at_the_end], -_LARGEST_BELOW_TOP, _LARGEST_BELOW_TOP)
    vanished = (halves == 0) & (scores_T != 0)
    halves[vanished] = np.copysign(_SMALLEST_HALF, scores_T[vanished])
    return halves, scale


def from_half(halves_T: Float16, scale_R: Float32, row_offsets: Int64) -> Float32:
    """The scores [T] that `to_half` stored, in float32.

    Raises:
        ValueError: a scale that `to_half` does not make.
    """
    mantissas, exponents = np.frexp(scale_R)
    if np.any(mantissas != 0.5) or np.any(exponents - 1 > _MAX_SCALE_EXPONENT):
        raise ValueError("scores_scale has values that are no powers of two, or too large")
    with np.errstate(over="ignore"):  # halves that no row has can still exceed float32
        return halves_T.astype(np.float32) * np.repeat(scale_R, np.diff(row_offsets))
