"""Files that are no step files, or no longer: each is refused with its name, and costs little."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influence.rundir import CorruptError, SchemaVersionError, StepArrays, decode, encode
from influence.rundir.archive import pack

from .steps import step_arrays

STEP = replace(step_arrays(lengths=(30, 0, 41)), positions=np.r_[np.arange(30) * 2, np.arange(41)])
DATA = encode(STEP, scores_dtype="float16")


def columns(**changes: object) -> dict[str, np.ndarray]:
    """The file's arrays with some changed, added, or (None) left out."""
    with np.load(io.BytesIO(DATA)) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays.update(changes)
    return {name: column for name, column in arrays.items() if column is not None}


def same(a: StepArrays, b: StepArrays) -> bool:
    return encode(a) == encode(b)


def refused(data: bytes, **options: object) -> str:
    """Why `decode` refuses these bytes, which it must with the path in the error."""
    with pytest.raises(CorruptError) as error:
        decode(data, path=Path("/runs/x/steps/step_000001.npz"), **options)
    assert str(error.value).startswith("/runs/x/steps/step_000001.npz: ")
    assert str(error.value).isprintable()
    return error.value.reason


def test_the_file_itself_is_fine() -> None:
    assert same(decode(DATA), decode(pack(columns())))


@pytest.mark.parametrize("part", range(8))
def test_a_file_that_is_cut_short_anywhere(part: int) -> None:
    for length in range(part, len(DATA), 8):
        refused(DATA[:length])


@pytest.mark.parametrize("part", range(8))
def test_a_flipped_bit_is_noticed_or_means_nothing(part: int) -> None:
    """Nothing but times and attributes in the ZIP's own bookkeeping may change without notice."""
    for place in range(part, len(DATA), 8):
        flipped = bytearray(DATA)
        flipped[place] ^= 1 << (place % 7)
        with suppress(CorruptError, SchemaVersionError):
            assert same(decode(bytes(flipped)), decode(DATA)), place


@given(st.binary(max_size=300), st.integers(0, len(DATA)), st.integers(0, 300))
@settings(max_examples=150, deadline=None)
def test_garbage_anywhere_raises_nothing_else(garbage: bytes, start: int, num_replaced: int) -> None:
    spoiled = DATA[:start] + garbage + DATA[start + num_replaced :]
    try:
        decode(spoiled)
    except (CorruptError, SchemaVersionError):
        return
    assert same(decode(spoiled), decode(DATA))


class Evil:
    """Says so when a pickle of it is loaded."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.mkdir, (os.environ["EVIL_MARK"],)


def test_no_pickle_is_ever_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    monkeypatch.setenv("EVIL_MARK", str(mark))
    evil = np.array([Evil()], dtype=object)
    for name in ("uid", "extra", "schema_version"):
        buffer = io.BytesIO()
        np.savez(buffer, **{**columns(), name: evil})
        if name == "extra":
            assert "holds ['extra']" in refused(buffer.getvalue())
            continue
        assert "pickled Python objects" in refused(buffer.getvalue())
    assert "no NPZ" in refused(pickle.dumps(Evil()))
    buffer = io.BytesIO()
    np.save(buffer, evil)
    assert "no NPZ" in refused(buffer.getvalue())
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil()))  # it would have told
    assert mark.exists()


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=version)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no NPZ"),
        (b"step,score\n1,2\n", "no NPZ"),
        (zipped([]), "no schema_version"),
        (zipped([("META-INF/MANIFEST.MF", b"x")]), "which no step file has"),
        (zipped([("a.npy", npy(np.arange(3)))]), "no schema_version"),
        (
            zipped([("a.npy", npy(np.arange(3))), ("b.npy", b"")]).replace(b"b.npy", b"a.npy"),
            "which no step file has",
        ),
        (zipped([("../../a.npy", npy(np.arange(3)))]), "no schema_version"),
        (zipped([("a.npy", npy(np.arange(3)))], zipfile.ZIP_LZMA), "packed in another way"),
        (zipped([(f"{i}.npy", npy(np.arange(3))) for i in range(100)]), "100 entries"),
        (DATA + b"\0", "no ZIP directory at its end"),
    ],
)
def test_other_files_are_no_steps(data: bytes, words: str) -> None:
    assert words in refused(data)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no NPY array of version 1.0"),
        (npy(np.arange(3), (2, 0)), "no NPY array of version 1.0"),
        (b"\x93NUMPY\x01\x00\x04\x00{}  ", "a header that no column has"),
        (b"\x93NUMPY\x01\x00\xff\xff{}  ", "a header of 65535 bytes"),
        (npy(np.zeros(2, dtype=[("x", "i4")])), "a header that no column has"),
        (npy(np.zeros((2, 2))), "a header that no column has"),
        (npy(np.zeros(2, dtype=complex)), "has the type '<c16'"),
        (npy(np.zeros(2, dtype=">f4")), "has the type '>f4'"),
        (npy(np.zeros(2, dtype="S4")), "has the type '|S4'"),
        (npy(np.zeros(2, dtype="<i4"))[:-1], "its header promises another number"),
        (npy(np.zeros(2, dtype="<i4")) + b"x", "its header promises another number"),
    ],
)
def test_entries_that_are_no_columns(content: bytes, words: str) -> None:
    assert words in refused(zipped([("schema_version.npy", content)]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": None}, "lacks scores"),
        ({"uid": None, "reward": None}, "lacks reward, uid"),
        ({"extra": np.arange(3)}, "holds ['extra']"),
        ({"scores_scale": None}, "do not belong together"),
        ({"scores": np.zeros(71, dtype=np.float32)}, "do not belong together"),
        ({"scores": np.zeros(71, dtype=np.float64), "scores_scale": None}, "has the type '<f8'"),
        ({"reward": np.zeros(3, dtype=np.float16)}, "reward has the type float16"),
        ({"reward": np.zeros(2, dtype=np.float32)}, "reward has 2 values for 3 rows and 71 scores"),
        ({"accepted": np.zeros(3, dtype=np.uint8)}, "accepted has the type uint8"),
        ({"row_id": np.zeros(3, dtype=np.uint64)}, "row_id has the type uint64"),
        ({"row_id": np.array(3)}, "row_id has None values"),
        ({"row_offsets": np.array(3)}, "no array of one dimension"),
        ({"row_offsets": np.array([], dtype=np.int64)}, "no array of one dimension"),
        ({"row_offsets": np.array([0, 30, 30, 71], dtype=np.int32)}, "row_offsets has the type int32"),
        ({"row_offsets": np.array([0, 30, 30, 2**60])}, "ends with 1152921504606846976, there are 71 scores"),
        ({"row_offsets": np.array([0, 2**60, -(2**60), 71])}, "does not rise"),
        ({"row_offsets": np.array([0, 2**63 - 1, 2**63 - 1, 71])}, "does not rise"),
        ({"scores_scale": np.array([1, np.nan, 1], dtype=np.float32)}, "scores_scale has values"),
        ({"scores_scale": np.array([1, 0, 1], dtype=np.float32)}, "scores_scale has values"),
        ({"scores_scale": np.array([1, -2, 1], dtype=np.float32)}, "scores_scale has values"),
        ({"scores_scale": np.array([1, 3, 1], dtype=np.float32)}, "scores_scale has values"),
        ({"scores_scale": np.array([1, 2.0**127, 1], dtype=np.float32)}, "scores_scale has values"),
        ({"positions": np.zeros(71, dtype=np.uint8)}, "positions do not increase"),
        ({"uid": np.array(["a", "b\0c", "d"])}, "NUL"),
        ({"tracer_config": np.frombuffer(b"{", dtype=np.uint8)}, "tracer_config is not valid JSON"),
        ({"tracer_config": np.frombuffer(b"[]", dtype=np.uint8)}, "not a JSON object"),
        ({"tracer_config": np.frombuffer(b"[" * 99_999, dtype=np.uint8)}, "tracer_config is not valid JSON"),
        ({"tracer_config": np.frombuffer(b"\xff", dtype=np.uint8)}, "tracer_config is not valid JSON"),
    ],
)
def test_columns_that_no_step_has_are_named(changes: dict[str, object], words: str) -> None:
    assert words in refused(pack(columns(**changes)))


def test_a_truth_value_that_is_neither() -> None:
    spoiled = pack(columns(accepted=np.array([0, 2, 1], dtype=np.uint8).view(np.bool_)))
    assert "neither true nor false" in refused(spoiled)


def test_another_schema_version_is_named_whatever_else_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "step_000001.npz"
    path.write_bytes(pack({"schema_version": np.array(7), "all_is_new": np.zeros((2, 2))}))
    with pytest.raises(
        SchemaVersionError, match="schema version 7, this installation reads version 1"
    ) as error:
        decode(path)
    assert error.value.path == path and (error.value.found, error.value.supported) == (7, 1)
    for odd in (np.array([1, 1]), np.array("1"), np.array(1.0, dtype=np.float32)):
        assert "schema_version is no integer" in refused(pack({"schema_version": odd}))


def peak_bytes(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_file_that_unpacks_to_too_much_is_refused_before_it_is_unpacked() -> None:
    num_scores = 20_000_000
    changes = {
        "scores": np.zeros(num_scores, dtype=np.float32),
        "scores_scale": None,
        "row_offsets": np.array([0, 30, 30, num_scores]),
        "positions": None,
        "token_ids": None,
        "log_probs": None,
    }
    bomb = pack(columns(**changes))
    assert len(bomb) < num_scores / 100
    assert decode(bomb).num_positions == num_scores  # it is a step, if a dull one
    assert peak_bytes(lambda: refused(bomb, max_bytes=10**6)) < 10**6


@pytest.mark.parametrize("num_packed_bytes", [None, 4_000_000])
def test_sizes_that_are_not_true_cost_nothing(num_packed_bytes: int | None) -> None:
    """A header and a ZIP directory that promise 4 GB, and perhaps 4 MB to unpack; there are 200 bytes."""
    num_scores = 10**9 - 32
    header = npy(np.zeros(0, dtype=np.float32)).replace(b"(0,), }" + b" " * 9, b"(%d,), }" % num_scores)
    lie = bytearray(zipped([("scores.npy", header)]))
    directory = lie.index(b"PK\x01\x02")
    lie[directory + 24 : directory + 28] = struct.pack("<I", len(header) + 4 * num_scores)
    if num_packed_bytes:
        lie[directory + 20 : directory + 24] = struct.pack("<I", num_packed_bytes)
    assert peak_bytes(lambda: refused(bytes(lie))) < 10**6
    assert "cannot be" in refused(bytes(lie))


def test_a_large_zip_directory_is_not_even_read() -> None:
    many = zipped([(f"{i}.npy", b"") for i in range(20_000)], zipfile.ZIP_STORED)
    assert peak_bytes(lambda: refused(many)) < 10**6


@pytest.mark.parametrize("from_end", range(1, 22))
def test_what_is_wrong_with_bytes_is_wrong_with_a_file(tmp_path: Path, from_end: int) -> None:
    """The end record says where the ZIP directory lies; files answer wrong offsets in their own way."""
    path = tmp_path / "step.npz"
    spoiled = bytearray(DATA)
    spoiled[-from_end] ^= 0xFF
    path.write_bytes(spoiled)
    try:
        assert same(decode(path), decode(bytes(spoiled)))
    except CorruptError as error:
        assert error.path == path
        refused(bytes(spoiled))


def test_a_path_is_read_as_its_bytes_are_and_a_link_is_not(tmp_path: Path) -> None:
    path = tmp_path / "step.npz"
    path.write_bytes(DATA)
    assert same(decode(path), decode(DATA))
    (tmp_path / "link.npz").symlink_to(path)
    with pytest.raises(CorruptError, match="symbolic link"):
        decode(tmp_path / "link.npz")
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "nothing.npz")
