"""NPZ archives, written reproducibly and read distrustfully.

An NPZ is a ZIP of NPY files. ``numpy.load`` reads any such file, whatever it holds and however large it
becomes; this reader takes one only if every entry is a plain array of a permitted type, as long as its
header and the ZIP directory agree that it is, and it looks at all of those before it allocates an array.
"""

from __future__ import annotations

import errno
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from influence.rundir.errors import CorruptError, StorageError

_LEVEL = 4  # of deflate: level 6 is 2 % smaller on token ids and takes four times as long
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest time a ZIP can hold
_REGULAR_FILE = 0o100644 << 16

_MAX_ENTRIES = 64
_MAX_DIRECTORY_BYTES = 2**16
_MAX_RATIO = 1040  # deflate's best is 1032
_END = struct.Struct("<4s4H2LH")  # the ZIP's end record: signature, disks, entries, directory size and offset
_ZIP64_LOCATOR_BYTES = 20

_MAGIC = b"\x93NUMPY\x01\x00"
_MAX_HEADER_BYTES = 1024
_HEADER = re.compile(
    rb"\{'descr': '([^']{1,16})', 'fortran_order': (?:False|True), 'shape': \((?:([0-9]{1,15}),)?\), \} *\n"
)
_PERMITTED = re.compile(r"[|]b1|[|][iu]1|<[iu][248]|<f[24]|<U[0-9]{1,4}")
_MALFORMED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,  # NotImplementedError too: a ZIP feature that Python lacks
    LookupError,
)


class ArrayHeader(NamedTuple):
    """What an entry says about itself before any of its data is read."""

    dtype: np.dtype[Any]
    length: int | None
    """None: a scalar."""

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * (1 if self.length is None else self.length)


def pack(columns: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """An NPZ of these arrays, entries sorted by name; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in sorted(columns):
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=_EPOCH)
            entry.create_system = 3
            entry.external_attr = _REGULAR_FILE
            content = io.BytesIO()
            np.lib.format.write_array(content, columns[name], version=(1, 0), allow_pickle=False)
            archive.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED, _LEVEL)
    return buffer.getvalue()


class Archive:
    """An NPZ that is open for reading; its methods raise `CorruptError` for what `pack` does not write.

    Args:
        stream: the file, seekable.
        path: its name for the messages.
        max_bytes: what all arrays together may take up.
    """

    def __init__(self, stream: BinaryIO, path: Path | None, *, max_bytes: int) -> None:
        self._path = path
        with self._malformed("the archive"):
            file_bytes = _check_end(stream)
            self._zip = zipfile.ZipFile(stream)
            entries = self._zip.infolist()
        self._entries: dict[str, zipfile.ZipInfo] = {}
        for entry in entries:
            name = entry.filename.removesuffix(".npy")
            if f"{name}.npy" != entry.filename or name in self._entries:
                raise self.error(f"holds the entry {ascii(entry.filename)[:80]}, which no step file has")
            if (
                entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
                or entry.flag_bits & ~0x800
            ):
                raise self.error(f"{name} is encrypted, or packed in another way than stored or deflated")
            self._entries[name] = entry
        num_bytes = sum(entry.file_size for entry in entries)
        if num_bytes > max_bytes:
            raise self.error(f"would unpack to {num_bytes} bytes, more than the {max_bytes} that are allowed")
        num_packed_bytes = sum(entry.compress_size for entry in entries)
        if num_packed_bytes > file_bytes or num_bytes > _MAX_RATIO * num_packed_bytes:
            raise self.error(
                f"says that {num_packed_bytes} of its bytes unpack to {num_bytes}, which cannot be"
            )

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._entries)

    def read(self, name: str) -> npt.NDArray[Any]:
        """One array, its checksum verified."""
        dtype, length = self.header(name)
        data = np.empty(1 if length is None else length, dtype)
        with self._malformed(name), self._zip.open(self._entries[name]) as stream:
            _read_header(stream)
            target = data.view(np.uint8).data
            num_read = 0
            while num_read < data.nbytes:
                chunk = stream.read(min(2**20, data.nbytes - num_read))
                if not chunk:
                    raise EOFError("ends early")
                target[num_read : num_read + len(chunk)] = chunk
                num_read += len(chunk)
            if stream.read(1):  # at the end zipfile compares the checksum
                raise ValueError("is longer than its header says")
        if dtype.kind == "b" and np.any(data.view(np.uint8) > 1):
            raise self.error(f"{name} has values that are neither true nor false")
        return data.reshape(()) if length is None else data

    def header(self, name: str) -> ArrayHeader:
        """What an array will be; it agrees with the ZIP directory."""
        entry = self._entries[name]
        with self._malformed(name), self._zip.open(entry) as stream:
            num_header_bytes, descr, length = _read_header(stream)
        if "O" in descr:
            raise self.error(f"{name} holds pickled Python objects, which are never read")
        if not _PERMITTED.fullmatch(descr):
            raise self.error(f"{name} has the type {descr!a}, which no column has")
        header = ArrayHeader(np.dtype(descr), length)
        if num_header_bytes + header.num_bytes != entry.file_size:
            raise self.error(f"{name} has {entry.file_size} bytes, its header promises another number")
        return header

    def error(self, reason: str) -> CorruptError:
        return CorruptError(self._path, reason)

    @contextmanager
    def _malformed(self, what: str) -> Iterator[None]:
        try:
            yield
        except _MALFORMED as error:
            raise self.error(f"{what} is cut short, altered or no NPZ ({error})") from None
        except OSError as error:
            if error.errno == errno.EINVAL:  # an offset before the file's begin
                raise self.error(f"{what} is cut short, altered or no NPZ (an impossible offset)") from None
            raise StorageError.from_os_error(error, self._path or "NPZ", "reading") from None


def _check_end(stream: BinaryIO) -> int:
    """Refuse a ZIP directory of a size that no step file has, before `zipfile` reads it as a whole.

    Returns the size of the file in bytes.
    """
    num_bytes = stream.seek(0, io.SEEK_END)
    tail_bytes = min(num_bytes, _END.size + _ZIP64_LOCATOR_BYTES)
    stream.seek(num_bytes - tail_bytes)
    tail = stream.read(tail_bytes)
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        raise ValueError("there is no ZIP directory at its end")
    _, _, _, _, num_entries, directory_bytes, _, _ = _END.unpack(tail[-_END.size :])
    if num_entries > _MAX_ENTRIES or directory_bytes > _MAX_DIRECTORY_BYTES or tail.startswith(b"PK\x06\x07"):
        raise ValueError(f"its ZIP directory has {num_entries} entries and {directory_bytes} bytes")
    return num_bytes


def _read_header(stream: Any) -> tuple[int, str, int | None]:
    """The NPY header at the stream's position: its size in bytes, the type's code, the length.

    numpy's own reader hands the header to a Python parser; ours is one pattern.
    """
    start = stream.read(len(_MAGIC) + 2)
    if not start.startswith(_MAGIC) or len(start) != len(_MAGIC) + 2:
        raise ValueError("no NPY array of version 1.0")
    (num_text_bytes,) = struct.unpack("<H", start[-2:])
    if num_text_bytes > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {num_text_bytes} bytes")
    text = stream.read(num_text_bytes)
    match = _HEADER.fullmatch(text)
    if not match or len(text) != num_text_bytes:
        raise ValueError("a header that no column has")
    length = None if match[2] is None else int(match[2])
    return len(start) + num_text_bytes, match[1].decode("ascii", "replace"), length
