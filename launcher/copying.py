"""Copies one file of a run directory: hashed on the way, compared, and never half there under its name.

The bytes go to ``<file>.part``, are compared with what is expected of them, synced, and only then take the
name. So ``<file>`` is at every moment the former good copy or the new good copy; an interrupted copy leaves
a ``.part``, which no reader looks at and the next copy overwrites.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from influence.rundir.errors import StorageError
from influence.rundir.files import list_dir, make_dir, open_inside, sync_dir

PART_SUFFIX = ".part"
_CHUNK_BYTES = 1 << 20

Advance = Callable[[int], None]
"""Told of every chunk that was read: its bytes."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What two equal files have in common."""

    num_bytes: int
    sha256: str  # lower-case hexadecimal


class MismatchError(Exception):
    """The bytes read are not the expected ones; whatever had the name before is untouched."""

    def __init__(self, found: Fingerprint, expected: Fingerprint) -> None:
        super().__init__(f"{found.num_bytes} bytes read, {expected.num_bytes} expected")
        self.found = found
        self.expected = expected


def fingerprint(root_dir: Path, path: Path, advance: Advance = lambda _: None) -> Fingerprint | None:
    """Size and hash of a file below ``root_dir``; None where there is none.

    Raises:
        CorruptError: a link, a pipe or a directory stands there.
        StorageError: it cannot be read.
    """
    try:
        with open_inside(root_dir, path) as stream:
            return _pump(stream, path, lambda _: None, advance)
    except FileNotFoundError:
        return None


def copy_file(
    source_root_dir: Path,
    source: Path,
    target: Path,
    *,
    expected: Fingerprint | None = None,
    accept: Callable[[Path], None] = lambda _: None,
    advance: Advance = lambda _: None,
) -> Fingerprint:
    """Replace ``target`` by ``source`` if that is what is expected of it.

    A file that grows meanwhile (a log) is copied up to the size that it had at the start.

    Args:
        accept: called with the copy before it takes the target's name; what it raises keeps it from that.

    Returns: size and hash of the copy.

    Raises:
        MismatchError: the source is not what is expected; nothing is replaced.
        FileNotFoundError: the source is not there.
        CorruptError: the source is a link, a pipe or a directory, or lies outside of ``source_root_dir``.
        StorageError: a filesystem refused.
    """
    with open_inside(source_root_dir, source) as stream, _replacing(target) as write:
        found = _pump(stream, source, write, advance)
        if expected is not None and found != expected:
            raise MismatchError(found, expected)
        accept(_part(target))
    return found


def remove_parts(directory: Path) -> None:
    """Remove what interrupted copies left in a directory; one that cannot be removed does no harm."""
    for path in list_dir(directory):
        if path.name.endswith(PART_SUFFIX):
            with suppress(OSError):
                path.unlink()


def _part(target: Path) -> Path:
    return target.with_name(target.name + PART_SUFFIX)


@contextmanager
def _replacing(target: Path) -> Iterator[Callable[[bytes], None]]:
    """Writes to a file that takes the name ``target`` at the end, and is gone after an error."""
    make_dir(target.parent)
    part = _part(target)
    with _storage_errors(target):
        part.unlink(missing_ok=True)
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def write(data: bytes) -> None:
        with _storage_errors(target):
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]

    try:
        try:
            yield write
            with _storage_errors(target):
                os.fsync(fd)
        finally:
            os.close(fd)
        with _storage_errors(target):
            part.replace(target)
            sync_dir(target.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def _pump(stream: BinaryIO, path: Path, write: Callable[[bytes], None], advance: Advance) -> Fingerprint:
    digest = hashlib.sha256()
    num_left = num_bytes = os.fstat(stream.fileno()).st_size
    while num_left:
        try:
            chunk = stream.read(min(_CHUNK_BYTES, num_left))
        except OSError as error:
            raise StorageError.from_os_error(error, path, "reading") from None
        if not chunk:  # cut short while it was read
            break
        digest.update(chunk)
        write(chunk)
        num_left -= len(chunk)
        advance(len(chunk))
    return Fingerprint(num_bytes - num_left, digest.hexdigest())


@contextmanager
def _storage_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError.from_os_error(error, target, "writing") from None
