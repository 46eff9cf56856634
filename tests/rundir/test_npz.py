from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from influence.rundir import NPZ_SCHEMA_VERSION, StepArrays, decode, encode
from influence.rundir.npz import OPTIONAL_COLUMNS, SCORES_DTYPES

from .steps import step_arrays

INT64 = st.integers(-(2**63), 2**63 - 1)
NATURAL = st.one_of(st.integers(0, 255), st.integers(0, 2**16), st.integers(0, 2**63 - 1))
FLOAT32 = st.floats(width=32)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
INTEGER_COLUMNS = ("row_id", "prompt_index", "session_id", "group_id", "response_length")


@st.composite
def any_step(draw: st.DrawFn) -> StepArrays:
    lengths = draw(st.lists(st.integers(0, 5), max_size=6))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    num_rows, num_positions = len(lengths), int(offsets[-1])

    def column(dtype: Any, length: int, elements: st.SearchStrategy[Any]) -> np.ndarray:
        return draw(st_np.arrays(dtype, length, elements=elements))

    positions = None
    if draw(st.booleans()):
        gaps = column(np.int64, num_positions, st.integers(1, 300))
        positions = np.concatenate(
            [np.cumsum(gaps[offsets[i] : offsets[i + 1]]) - 1 for i in range(num_rows)] or [[]]
        )
        positions = positions.astype(np.int64)
    advantages = None
    if draw(st.booleans()):
        length = draw(st.sampled_from([num_rows, num_positions]))
        advantages = column(np.float32, length, st.sampled_from([0.0, -0.0, 1.5, float("nan")]) | FLOAT32)
    return StepArrays(
        row_offsets=offsets,
        scores=column(np.float32, num_positions, FLOAT32),
        row_id=column(np.int64, num_rows, INT64),
        prompt_index=column(np.int64, num_rows, INT64),
        session_id=column(np.int64, num_rows, NATURAL),
        uid=draw(st.lists(TEXT, min_size=num_rows, max_size=num_rows)),
        reward=column(np.float32, num_rows, FLOAT32),
        accepted=column(np.bool_, num_rows, st.booleans()),
        scored=column(np.bool_, num_rows, st.booleans()),
        group_id=column(np.int64, num_rows, INT64),
        response_length=column(np.int64, num_rows, NATURAL),
        token_ids=draw(st.none() | st_np.arrays(np.int64, num_positions, elements=NATURAL)),
        log_probs=draw(st.none() | st_np.arrays(np.float32, num_positions, elements=FLOAT32)),
        positions=positions,
        advantages=advantages,
        tracer_config=draw(
            st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers(), max_size=2)
        ),
    )


def a_token(step: StepArrays, column: np.ndarray | None) -> list[float] | None:
    """A column that is one a row or one a token, as one a token; row by row, the slow way."""
    if column is None or len(column) != step.num_rows:
        return None if column is None else [float(value) for value in column]
    lengths = [int(step.row_offsets[i + 1] - step.row_offsets[i]) for i in range(step.num_rows)]
    return [float(value) for value, length in zip(column, lengths, strict=True) for _ in range(length)]


@given(any_step(), st.sets(st.sampled_from(OPTIONAL_COLUMNS)))
@settings(max_examples=150, deadline=None)
def test_what_is_encoded_comes_back(step: StepArrays, columns: set[str]) -> None:
    back = decode(encode(step, columns=columns))
    for name in ("row_offsets", "scores", "reward", "accepted", "scored", *INTEGER_COLUMNS):
        before, after = getattr(step, name), getattr(back, name)
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(after, before)
    assert tuple(back.uid) == tuple(step.uid) and back.tracer_config == step.tracer_config
    if step.positions is None:
        assert back.positions is None
    else:
        counted = [
            t - int(step.row_offsets[i])
            for i in range(step.num_rows)
            for t in range(*step.row_offsets[i : i + 2])
        ]
        np.testing.assert_array_equal(counted if back.positions is None else back.positions, step.positions)
    for name in OPTIONAL_COLUMNS:
        if name not in columns or getattr(step, name) is None:
            assert getattr(back, name) is None
    if back.token_ids is not None:
        assert back.token_ids.dtype == np.int64
        np.testing.assert_array_equal(back.token_ids, step.token_ids)
    if back.log_probs is not None:
        assert back.log_probs.dtype == np.float32
        np.testing.assert_array_equal(np.isfinite(back.log_probs), np.isfinite(step.log_probs))
        within = np.isfinite(step.log_probs) & (np.abs(step.log_probs) < 65504)
        np.testing.assert_allclose(back.log_probs[within], step.log_probs[within], rtol=2**-11, atol=2**-25)
    if back.advantages is not None:
        np.testing.assert_array_equal(a_token(step, back.advantages), a_token(step, step.advantages))


@given(any_step(), st.sampled_from(SCORES_DTYPES))
@settings(max_examples=50, deadline=None)
def test_equal_data_gives_equal_bytes_and_decoding_loses_nothing_more(
    step: StepArrays, scores_dtype: str
) -> None:
    data = encode(step, scores_dtype=scores_dtype)
    assert encode(step, scores_dtype=scores_dtype) == data
    again = encode(decode(data), scores_dtype=scores_dtype)
    assert again == data


def entries(data: bytes) -> dict[str, np.ndarray]:
    """The arrays as numpy's own reader sees them."""
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def test_the_file_is_an_npz_that_numpy_reads_with_the_documented_types() -> None:
    step = step_arrays()
    stored = entries(encode(step))
    assert list(stored) == sorted(stored)
    types = {name: (column.dtype.str, column.shape) for name, column in stored.items()}
    assert types == {
        "accepted": ("|b1", (3,)),
        "advantages": ("<f4", (3,)),
        "group_id": ("|u1", (3,)),
        "log_probs": ("<f2", (5,)),
        "prompt_index": ("<u2", (3,)),
        "response_length": ("|u1", (3,)),
        "reward": ("<f4", (3,)),
        "row_id": ("|u1", (3,)),
        "row_offsets": ("<i8", (4,)),
        "schema_version": ("|u1", ()),
        "scored": ("|b1", (3,)),
        "scores": ("<f4", (5,)),
        "session_id": ("|u1", (3,)),
        "token_ids": ("<u4", (5,)),
        "tracer_config": ("|u1", (stored["tracer_config"].size,)),
        "uid": ("<U5", (3,)),
    }
    assert stored["schema_version"] == NPZ_SCHEMA_VERSION
    assert json.loads(stored["tracer_config"].tobytes()) == step.tracer_config
    half = entries(encode(step, scores_dtype="float16"))
    assert (half["scores"].dtype, half["scores_scale"].dtype, half["scores_scale"].shape) == (
        "<f2",
        "<f4",
        (3,),
    )


def test_nothing_in_the_archive_depends_on_time_or_machine() -> None:
    with zipfile.ZipFile(io.BytesIO(encode(step_arrays()))) as archive:
        for entry in archive.infolist():
            assert entry.date_time == (1980, 1, 1, 0, 0, 0)
            assert (entry.create_system, entry.external_attr >> 16) == (3, 0o100644)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([0, 255], "|u1"),
        ([0, 256], "<u2"),
        ([-1, 127], "|i1"),
        ([-1, 128], "<i2"),
        ([0, 65536], "<u4"),
        ([-1, 65536], "<i4"),
        ([0, 2**32], "<i8"),
        ([-(2**63), 2**63 - 1], "<i8"),
    ],
)
def test_integers_get_the_smallest_type_that_holds_them(values: list[int], dtype: str) -> None:
    step = replace(step_arrays(lengths=(1, 1)), prompt_index=np.array(values))
    data = encode(step)
    assert entries(data)["prompt_index"].dtype.str == dtype
    assert decode(data).prompt_index.tolist() == values


def test_positions_are_kept_exactly_if_something_was_capped() -> None:
    step = step_arrays(lengths=(2, 3))
    uncapped = replace(step, positions=np.array([0, 1, 0, 1, 2]))
    capped = replace(step, positions=np.array([0, 9, 0, 5, 300]))
    assert "positions" not in entries(encode(uncapped))
    assert decode(encode(capped, columns=[])).positions.tolist() == [0, 9, 0, 5, 300]
    with_prompt = replace(step, positions=np.array([-1, 0, -300, -1, 2]))
    assert entries(encode(with_prompt))["positions"].dtype == np.int16
    assert decode(encode(with_prompt)).positions.tolist() == [-1, 0, -300, -1, 2]


def test_advantages_that_are_constant_in_each_row_are_stored_once_a_row() -> None:
    step = step_arrays(lengths=(2, 0, 3))
    constant = replace(step, advantages=np.array([0.5, 0.5, -1, -1, -1], dtype=np.float32))
    varying = replace(step, advantages=np.array([0.5, 0.5, -1, -1, -2], dtype=np.float32))
    np.testing.assert_array_equal(decode(encode(constant)).advantages, [0.5, np.nan, -1])
    np.testing.assert_array_equal(decode(encode(varying)).advantages, varying.advantages)


def test_a_step_of_the_reference_run_takes_no_more_than_29_megabytes() -> None:
    """6,129,414 positions in 768 rows, with scores and log-probs that hardly compress."""
    random = np.random.default_rng(0)
    lengths = np.full(768, 6_129_414 // 768)
    lengths[: 6_129_414 % 768] += 1
    step = replace(
        step_arrays(lengths=tuple(lengths.tolist())),
        scores=random.standard_normal(6_129_414, dtype=np.float32),
        token_ids=None,
    )
    data = encode(step, scores_dtype="float16", columns=["log_probs", "advantages"])
    assert len(data) <= 29e6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"row_offsets": np.array([0, 4, 3, 5])}, "row_offsets does not rise"),
        ({"row_offsets": np.array([1, 3, 3, 5])}, "row_offsets does not rise"),
        ({"row_offsets": np.array([], dtype=np.int64)}, "row_offsets does not rise"),
        ({"row_offsets": np.array([0, 3, 3, 4])}, "ends with 4, there are 5 scores"),
        ({"row_offsets": np.array([0.0, 3, 3, 5])}, "row_offsets has the type float64"),
        ({"reward": np.zeros(4)}, "reward has 4 values"),
        ({"reward": np.array(["a", "b", "c"])}, "reward has the type"),
        ({"accepted": np.array([0, 1, 1])}, "accepted has the type int64"),
        ({"token_ids": np.arange(4)}, "token_ids has 4 values"),
        ({"token_ids": np.array([0, 1, 2, 3, -1])}, "token_ids has negative"),
        ({"scores": np.zeros((5, 1))}, "scores has 2 dimensions"),
        ({"positions": np.array([0, 1, 1, 0, 1])}, "positions do not increase"),
        ({"positions": np.array([0, 1, 2, 1, 0])}, "positions do not increase"),
        ({"advantages": np.zeros(4)}, "advantages has 4 values"),
        ({"uid": ["a", "b"]}, "uid has 2 values"),
        ({"uid": ["a", "b", "c\0"]}, "NUL"),
        ({"uid": ["a", "b", "\ud800"]}, "no text"),
        ({"uid": ["a", "b", "x" * 300]}, "too long"),
    ],
)
def test_arrays_that_do_not_fit_together_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encode(replace(step_arrays(), **changes))


def test_unknown_options_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'float64', not one of float32, float16"):
        encode(step_arrays(), scores_dtype="float64")
    with pytest.raises(ValueError, match="tokens; there are token_ids, log_probs, advantages"):
        encode(step_arrays(), columns=["tokens", "log_probs"])


def test_lists_and_other_number_types_are_taken_where_nothing_is_lost() -> None:
    step = replace(step_arrays(), reward=[0, 1, 1], row_id=np.array([1, 2, 3], dtype=np.int32))
    back = decode(encode(step))
    assert back.reward.tolist() == [0.0, 1.0, 1.0] and back.row_id.dtype == np.int64


def test_a_step_without_rows() -> None:
    back = decode(encode(step_arrays(lengths=())))
    assert (back.num_rows, back.num_positions) == (0, 0)
