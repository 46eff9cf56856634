"""The NPZ file of a step: which arrays it holds, and in which types.

R rows (responses), T scores in all. Every array has one dimension but the scalar ``schema_version``;
integers have the smallest type that holds their values, little-endian. Decoding gives back the types of
`StepArrays`.

=================  ==========  ======  ====================================================================
array              type        length  content
=================  ==========  ======  ====================================================================
schema_version     integer     scalar  `NPZ_SCHEMA_VERSION`
tracer_config      uint8       any     the tracer's options, JSON in UTF-8
row_offsets        int64       R + 1   row i has the scores ``row_offsets[i]:row_offsets[i + 1]``
scores             float32     T       NaN: not captured; as float16: times ``scores_scale`` of its row
                   or float16
scores_scale       float32     R       only with float16 scores (`half`)
row_id             integer     R
prompt_index       integer     R
session_id         integer     R
uid                unicode     R       fixed width
reward             float32     R
accepted           bool        R
scored             bool        R
group_id           integer     R
response_length    integer     R
positions          integer     T       only where a row's tokens are not its first ones (capped); negative
                                       in the prompt, which readers older than these refuse
token_ids          integer     T       optional
log_probs          float16     T       optional; rounded to 11 significant bits
advantages         float32     R or T  optional; one a row where they are constant in each row
=================  ==========  ======  ====================================================================
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from influence.rundir.archive import Archive, pack
from influence.rundir.arrays import Float32, Int64, StepArrays, checked, require_offsets
from influence.rundir.errors import CorruptError, SchemaVersionError
from influence.rundir.files import open_inside
from influence.rundir.half import from_half, to_half
from influence.rundir.spec import canonical_json

NPZ_SCHEMA_VERSION = 1
SCORES_DTYPES = ("float32", "float16")
OPTIONAL_COLUMNS = ("token_ids", "log_probs", "advantages")
"""What ``store.columns`` may name. ``positions`` is no choice: without it capped scores have no place."""

MAX_UNPACKED_BYTES = 4 * 2**30
"""Of all arrays of a file, unless the caller of `decode` allows more: about 250 million positions."""

_INTEGERS = ("row_id", "prompt_index", "session_id", "group_id", "response_length")
_REQUIRED = frozenset(
    (
        "schema_version",
        "tracer_config",
        "row_offsets",
        "scores",
        "uid",
        "reward",
        "accepted",
        "scored",
        *_INTEGERS,
    )
)
_KNOWN = _REQUIRED | {"scores_scale", "positions", *OPTIONAL_COLUMNS}
_KINDS = {  # numpy's kind letters, with the item sizes where only some are right
    "schema_version": "iu",
    "tracer_config": "u1",
    "row_offsets": "i8",
    "scores": "f",
    "scores_scale": "f4",
    "uid": "U",
    "reward": "f4",
    "accepted": "b",
    "scored": "b",
    "log_probs": "f2",
    "advantages": "f4",
    "token_ids": "iu",
    "positions": "iu",
    **dict.fromkeys(_INTEGERS, "iu"),
}
_INTEGER_TYPES = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32)
_LARGEST_HALF = np.float32(np.finfo(np.float16).max)


def require_encoding(scores_dtype: str, columns: Iterable[str]) -> None:
    """Raises ValueError unless `encode` knows these options."""
    if scores_dtype not in SCORES_DTYPES:
        raise ValueError(f"scores_dtype is {scores_dtype!r}, not one of {', '.join(SCORES_DTYPES)}")
    if unknown := sorted(set(columns).difference(OPTIONAL_COLUMNS)):
        raise ValueError(f"columns names {', '.join(unknown)}; there are {', '.join(OPTIONAL_COLUMNS)}")


def encode(
    arrays: StepArrays, *, scores_dtype: str = "float32", columns: Collection[str] = OPTIONAL_COLUMNS
) -> bytes:
    """The file's bytes; equal data gives equal bytes.

    Args:
        scores_dtype: ``float32``, or ``float16`` with a scale a row.
        columns: which of the optional columns to keep, where the step has them.

    Raises:
        ValueError: the arrays do not fit together, or an option is unknown.
        TypeError: the tracer's options are not JSON.
    """
    require_encoding(scores_dtype, columns)
    arrays = checked(arrays)
    offsets = arrays.row_offsets
    stored: dict[str, npt.NDArray[Any]] = {
        "schema_version": np.array(NPZ_SCHEMA_VERSION, dtype=np.uint8),
        "tracer_config": np.frombuffer(canonical_json(arrays.tracer_config), dtype=np.uint8),
        "row_offsets": offsets,
        "scores": arrays.scores,
        "uid": np.array(arrays.uid, dtype=np.str_),
        "reward": arrays.reward,
        "accepted": arrays.accepted,
        "scored": arrays.scored,
        **{name: _smallest(getattr(arrays, name)) for name in _INTEGERS},
    }
    if scores_dtype == "float16":
        stored["scores"], stored["scores_scale"] = to_half(arrays.scores, offsets)
    if arrays.positions is not None and not np.array_equal(arrays.positions, first_positions(offsets)):
        stored["positions"] = _smallest(arrays.positions)
    if arrays.token_ids is not None and "token_ids" in columns:
        stored["token_ids"] = _smallest(arrays.token_ids)
    if arrays.log_probs is not None and "log_probs" in columns:
        stored["log_probs"] = _rounded(arrays.log_probs)
    if arrays.advantages is not None and "advantages" in columns:
        stored["advantages"] = _a_row_where_constant(arrays.advantages, offsets)
    return pack({name: _little_endian(column) for name, column in stored.items()})


def decode(
    data_or_path: bytes | Path, *, max_bytes: int = MAX_UNPACKED_BYTES, path: Path | None = None
) -> StepArrays:
    """The arrays of a file that `encode` wrote, checked as a whole; no pickle is ever read.

    Args:
        max_bytes: what the arrays may take up together; nothing is allocated for a file that claims more.
        path: where the bytes come from, for the messages.

    Raises:
        SchemaVersionError: another version wrote it; names both.
        CorruptError: cut short, altered, pickled, too large, or no step file at all; names the file.
        FileNotFoundError, StorageError: the file cannot be read.
    """
    with ExitStack() as stack:
        if isinstance(data_or_path, bytes):
            stream: BinaryIO = stack.enter_context(io.BytesIO(data_or_path))
        else:
            path = Path(data_or_path)
            stream = stack.enter_context(open_inside(path.parent, path))
        archive = Archive(stream, path, max_bytes=max_bytes)
        _check_version(archive, path)
        _check_headers(archive)
        stored = {name: archive.read(name) for name in archive.names}
    try:
        return _restored(stored)
    except ValueError as error:
        raise CorruptError(path, str(error)) from None


def first_positions(row_offsets: Int64) -> Int64:
    """[T]: 0, 1, 2, ... in each row; the positions of tokens that were not capped."""
    lengths = np.diff(row_offsets)
    return np.arange(row_offsets[-1], dtype=np.int64) - np.repeat(row_offsets[:-1], lengths)


def _smallest(values: Int64) -> npt.NDArray[Any]:
    if len(values) == 0:
        return values.astype(np.uint8)
    low, high = int(values.min()), int(values.max())
    for dtype in _INTEGER_TYPES:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return values.astype(dtype)
    return values


def _rounded(log_probs: Float32) -> npt.NDArray[np.float16]:
    finite = np.isfinite(log_probs)
    within = np.clip(log_probs, -_LARGEST_HALF, _LARGEST_HALF)
    return np.where(finite, within, log_probs).astype(np.float16)


def _a_row_where_constant(advantages: Float32, offsets: Int64) -> Float32:
    num_rows, lengths = len(offsets) - 1, np.diff(offsets)
    if len(advantages) == num_rows:
        return advantages
    a_row = np.full(num_rows, np.nan, dtype=np.float32)  # a row without tokens has none
    a_row[lengths > 0] = advantages[offsets[:-1][lengths > 0]]
    # bits, so that NaN equals itself and -0.0 is not 0.0
    constant = np.array_equal(np.repeat(a_row, lengths).view(np.uint32), advantages.view(np.uint32))
    return a_row if constant else advantages


def _little_endian(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return column.astype(column.dtype.newbyteorder("<"), copy=False)


def _check_version(archive: Archive, path: Path | None) -> None:
    """Before anything else: another version may have other columns, of types that this one does not know."""
    if "schema_version" not in archive.names:
        raise archive.error("is no step file: it has no schema_version")
    header = archive.header("schema_version")
    if header.length is not None or header.dtype.kind not in "iu":
        raise archive.error("is no step file: its schema_version is no integer")
    version = int(archive.read("schema_version"))
    if version != NPZ_SCHEMA_VERSION:
        raise SchemaVersionError(path, "the NPZ has", version, NPZ_SCHEMA_VERSION)


def _check_headers(archive: Archive) -> None:
    """Names, types and lengths, before any array is read."""
    if absent := sorted(_REQUIRED - archive.names):
        raise archive.error(f"lacks {', '.join(absent)}")
    if foreign := sorted(archive.names - _KNOWN):
        raise archive.error(f"holds {ascii(foreign)[:200]}, which no step file has")
    headers = {name: archive.header(name) for name in sorted(archive.names)}
    if (headers["scores"].dtype.itemsize == 2) != ("scores_scale" in headers):
        raise archive.error("scores and scores_scale do not belong together")
    num_rows = (headers["row_offsets"].length or 0) - 1
    num_positions = headers["scores"].length
    if num_rows < 0 or num_positions is None:
        raise archive.error("row_offsets or scores is no array of one dimension")
    lengths = {
        "schema_version": (None,),
        "tracer_config": (headers["tracer_config"].length or 0,),
        "row_offsets": (num_rows + 1,),
        "advantages": (num_rows, num_positions),
        **dict.fromkeys(("scores", "token_ids", "log_probs", "positions"), (num_positions,)),
    }
    for name, (dtype, length) in headers.items():
        kinds = _KINDS[name]
        code = f"{dtype.kind}{dtype.itemsize}"
        if dtype.kind not in kinds or (kinds[1:].isdigit() and code != kinds) or code == "u8":
            raise archive.error(f"{name} has the type {dtype}, which it never has")
        if length not in lengths.get(name, (num_rows,)):
            raise archive.error(f"{name} has {length} values for {num_rows} rows and {num_positions} scores")


def _restored(stored: dict[str, npt.NDArray[Any]]) -> StepArrays:
    """The arrays in the types of `StepArrays`; ValueError where their values cannot be."""
    offsets = stored["row_offsets"].astype(np.int64)
    require_offsets(offsets, len(stored["scores"]))
    scores = stored["scores"]
    if "scores_scale" in stored:
        scores = from_half(scores, stored["scores_scale"], offsets)
    log_probs = stored.get("log_probs")
    return checked(
        StepArrays(
            row_offsets=offsets,
            scores=scores,
            **{name: stored[name].astype(np.int64) for name in _INTEGERS},
            uid=stored["uid"].tolist(),
            reward=stored["reward"],
            accepted=stored["accepted"],
            scored=stored["scored"],
            positions=_widened(stored.get("positions")),
            token_ids=_widened(stored.get("token_ids")),
            log_probs=None if log_probs is None else log_probs.astype(np.float32),
            advantages=stored.get("advantages"),
            tracer_config=_tracer_config(stored["tracer_config"].tobytes()),
        )
    )


def _widened(column: npt.NDArray[Any] | None) -> Int64 | None:
    return None if column is None else column.astype(np.int64)


def _tracer_config(text: bytes) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tracer_config is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError("tracer_config is not a JSON object")
    return config
