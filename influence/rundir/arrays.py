"""What the tracer hands over for one step, in the types that code works with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

MAX_UID_CHARS = 256


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepArrays:
    """The rows (responses) of one step, R of them, with T scores in all.

    Rows lie one after another (CSR): row i has the scores ``row_offsets[i]`` to ``row_offsets[i + 1]``.
    """

    row_offsets: Int64
    """[R+1], from 0 to T."""
    scores: Float32
    """[T]; NaN: not captured. Zero in rows that are not `scored`."""
    row_id: Int64
    """[R]"""
    prompt_index: Int64
    """[R], the prompt's index in the data set."""
    session_id: Int64
    """[R], which of the prompt's responses."""
    uid: Sequence[str]
    """[R], the trainer's own name of the prompt's group; differs between attempts."""
    reward: Float32
    """[R]"""
    accepted: Bool
    """[R], whether the reward is above the threshold."""
    scored: Bool
    """[R]; False: the group has no contrast, or its solve failed."""
    group_id: Int64
    """[R], rows of one group were compared with one another."""
    response_length: Int64
    """[R], tokens of the response, captured or not."""
    token_ids: Int64 | None = None
    """[T]"""
    log_probs: Float32 | None = None
    """[T], of the policy that generated or was updated; NaN: not known, as of a prompt's tokens."""
    positions: Int64 | None = None
    """[T], each score's token in its response, rising in a row; None: the row's first tokens, 0, 1, 2, ...

    Negative: a token of the prompt, counted from its end (-1 is its last).
    """
    advantages: Float32 | None = None
    """[R] one a row, or [T] one a token (one a row wherever R = T)."""
    tracer_config: Mapping[str, Any] = field(default_factory=dict)
    """The tracer's options, as JSON has them."""

    @property
    def num_rows(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def num_positions(self) -> int:
        return len(self.scores)

    @property
    def row_lengths(self) -> Int64:
        """[R], scores a row."""
        return np.diff(self.row_offsets)


_ROW_TYPES: dict[str, type[np.generic]] = {
    "row_id": np.int64,
    "prompt_index": np.int64,
    "session_id": np.int64,
    "reward": np.float32,
    "accepted": np.bool_,
    "scored": np.bool_,
    "group_id": np.int64,
    "response_length": np.int64,
}
_TOKEN_TYPES: dict[str, type[np.generic]] = {
    "scores": np.float32,
    "token_ids": np.int64,
    "log_probs": np.float32,
    "positions": np.int64,
}
_UNSIGNED = ("response_length", "token_ids")


def checked(arrays: StepArrays) -> StepArrays:
    """The same data, every array in its documented type, shape and range.

    Raises:
        ValueError: names the column and what is wrong with it.
    """
    offsets = _as_column("row_offsets", arrays.row_offsets, np.int64)
    require_offsets(offsets, len(arrays.scores))
    num_rows, num_positions = len(offsets) - 1, int(offsets[-1])
    columns: dict[str, Any] = {"row_offsets": offsets, "tracer_config": dict(arrays.tracer_config)}
    for types, length in ((_ROW_TYPES, num_rows), (_TOKEN_TYPES, num_positions)):
        for name, dtype in types.items():
            value = getattr(arrays, name)
            columns[name] = None if value is None else _as_column(name, value, dtype, length)
    columns["uid"] = _checked_uid(arrays.uid, num_rows)
    columns["advantages"] = None
    if arrays.advantages is not None:
        advantages = _as_column("advantages", arrays.advantages, np.float32)
        if len(advantages) not in (num_rows, num_positions):
            raise ValueError(
                f"advantages has {len(advantages)} values for {num_rows} rows and {num_positions} scores"
            )
        columns["advantages"] = advantages
    for name in _UNSIGNED:
        if columns[name] is not None and np.any(columns[name] < 0):
            raise ValueError(f"{name} has negative values")
    if columns["positions"] is not None:
        _check_increasing(columns["positions"], offsets)
    return StepArrays(**columns)


def require_offsets(offsets: Int64, num_positions: int) -> None:
    """Raises ValueError unless the offsets divide ``num_positions`` scores into rows."""
    if len(offsets) == 0 or offsets[0] != 0 or np.any(offsets[1:] < offsets[:-1]):
        raise ValueError("row_offsets does not rise from 0")
    if offsets[-1] != num_positions:
        raise ValueError(f"row_offsets ends with {offsets[-1]}, there are {num_positions} scores")


def _as_column(name: str, value: Any, dtype: type[np.generic], length: int | None = None) -> npt.NDArray[Any]:
    column = np.asarray(value)
    if column.size == 0:
        column = column.astype(dtype)  # an empty list has no type of its own
    elif not np.can_cast(column.dtype, dtype, "same_kind"):
        raise ValueError(f"{name} has the type {column.dtype}, which {np.dtype(dtype)} does not hold")
    if column.ndim != 1:
        raise ValueError(f"{name} has {column.ndim} dimensions, not one")
    if length is not None and len(column) != length:
        raise ValueError(f"{name} has {len(column)} values where row_offsets asks for {length}")
    return np.ascontiguousarray(column, dtype=dtype)


def _checked_uid(uid: Sequence[str], num_rows: int) -> tuple[str, ...]:
    names = tuple(str(name) for name in uid)
    if len(names) != num_rows:
        raise ValueError(f"uid has {len(names)} values where row_offsets asks for {num_rows}")
    for name in names:
        if len(name) > MAX_UID_CHARS or "\0" in name or not _is_unicode(name):
            raise ValueError(f"uid has {name[:40]!a}, which is too long, or no text, or has a NUL in it")
    return names


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _check_increasing(positions: Int64, offsets: Int64) -> None:
    steps = np.diff(positions)
    row_starts = offsets[1:-1]
    within_row = np.ones(len(steps), dtype=np.bool_)
    within_row[row_starts[(row_starts > 0) & (row_starts < len(positions))] - 1] = False
    if np.any(steps[within_row] <= 0):
        raise ValueError("positions do not increase within a row")
