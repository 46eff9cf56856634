from __future__ import annotations

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from influence.rundir.half import from_half, to_half

FLOAT32 = st.floats(width=32, allow_nan=True, allow_infinity=False)


def offsets_of(lengths: list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


@given(st.lists(st.integers(0, 6), max_size=6), st.data())
@settings(max_examples=100, deadline=None)
def test_no_score_overflows_vanishes_or_is_off_by_more_than_a_half_allows(
    lengths: list[int], data: st.DataObject
) -> None:
    offsets = offsets_of(lengths)
    scores = data.draw(st_np.arrays(np.float32, int(offsets[-1]), elements=FLOAT32))
    halves, scale = to_half(scores, offsets)
    assert halves.dtype == np.float16 and scale.dtype == np.float32 and len(scale) == len(lengths)
    back = from_half(halves, scale, offsets)
    np.testing.assert_array_equal(np.isnan(back), np.isnan(scores))
    for row in range(len(lengths)):
        span = slice(offsets[row], offsets[row + 1])
        finite = np.isfinite(scores[span])
        before, after = scores[span][finite].astype(np.float64), back[span][finite].astype(np.float64)
        assert np.all(np.isfinite(after))
        np.testing.assert_array_equal(np.sign(after), np.sign(before))  # zero only where zero was
        if len(before):
            # 11 significant bits of the score itself, and never worse than 2^-38 of the row's largest
            allowed = np.abs(before) * 2.0**-11 + np.abs(before).max() * 2.0**-38 + 2.0**-149
            assert np.all(np.abs(after - before) <= allowed)


def test_scales_are_powers_of_two_and_rows_are_independent() -> None:
    scores = np.array([1e30, -2e30, 1e-30, 3e-30, 0, 0, np.nan, np.inf], dtype=np.float32)
    offsets = np.array([0, 2, 4, 6, 6, 8])
    halves, scale = to_half(scores, offsets)
    mantissa, _ = np.frexp(scale)
    assert np.all(mantissa == 0.5)
    back = from_half(halves, scale, offsets)
    np.testing.assert_allclose(back[:4], scores[:4], rtol=2**-11)
    np.testing.assert_array_equal(back[4:], scores[4:])


def test_values_of_a_half_come_back_bit_for_bit() -> None:
    scores = np.array([1.0, -0.5, 0.333251953125, 0.0, -0.0], dtype=np.float32)
    back = from_half(*to_half(scores, np.array([0, 5])), np.array([0, 5]))
    assert back.tobytes() == scores.tobytes()


@given(st_np.arrays(np.float32, 4, elements=FLOAT32))
@example(np.array([4095, 1, 0, -3], dtype=np.float32))  # rounds up to a power of two
@example(np.full(4, np.finfo(np.float32).max))
def test_what_was_stored_once_is_stored_again_bit_for_bit(scores: np.ndarray) -> None:
    offsets = np.array([0, 4])
    halves, scale = to_half(scores, offsets)
    again, its_scale = to_half(from_half(halves, scale, offsets), offsets)
    assert (again.tobytes(), its_scale.tobytes()) == (halves.tobytes(), scale.tobytes())


def test_the_ends_of_float32() -> None:
    """Rounded up, the largest scores would be infinite; the smallest lie below every normal number."""
    ends = np.finfo(np.float32)
    scores = np.array([ends.max, 1.0, -ends.max, ends.smallest_subnormal, ends.tiny], dtype=np.float32)
    offsets = np.array([0, 2, 3, 4, 5])
    back = from_half(*to_half(scores, offsets), offsets)
    np.testing.assert_allclose(back[[0, 2, 3, 4]], scores[[0, 2, 3, 4]], rtol=2**-10)
    assert back[1] > 0
