"""Reading and writing files of a run directory: whole or not at all, and never outside of it.

Every operating-system error leaves this module as a `StorageError`; `FileNotFoundError` (reading) and
`FileExistsError` (exclusive writing) alone keep their type, because callers act on them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from influence.rundir.errors import CorruptError, StorageError
from influence.rundir.rename import rename_noreplace

MAX_JSON_BYTES = 16 * 2**20
_CHUNK_BYTES = 2**20
_TMP_SUFFIX = ".tmp"


def write_atomic(path: Path, data: bytes, *, exclusive: bool = False, label: str = "new") -> None:
    """Write a file so that under its name there is never a part of it, not even after a crash.

    The bytes go to a unique temporary file in the same directory and to the disk (fsync); then the name is
    set, and the directory goes to the disk. A failure leaves no temporary file; a crash can leave one, which
    no reader looks at and `remove_temporaries` takes away.

    Args:
        exclusive: never replace what has the name already.
        label: part of the temporary file's name, so that leftovers can be told apart (``attempt-0002``).

    Raises:
        FileExistsError: ``exclusive``, and the name is taken. It is complete then: whoever took it wrote
            it this way.
        StorageError: the filesystem refused.
    """
    with temporary(path, data, label=label) as tmp:
        publish(tmp, path, exclusive=exclusive)


@contextmanager
def temporary(path: Path, data: bytes, *, label: str) -> Iterator[Path]:
    """A synced file with these bytes beside ``path``, gone at the end unless it was renamed."""
    tmp = _temporary_name(path, label)
    try:
        try:
            _write_synced(tmp, data)
        except OSError as error:
            raise StorageError.from_os_error(error, path, "writing") from None
        yield tmp
    finally:
        with suppress(OSError):
            tmp.unlink()


def publish(tmp: Path, path: Path, *, exclusive: bool) -> None:
    """Give a temporary file its name, durably; raises as `write_atomic` does."""
    try:
        if exclusive:
            rename_noreplace(tmp, path)
        else:
            tmp.replace(path)
        sync_dir(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise StorageError.from_os_error(error, path, "writing") from None


@contextmanager
def moved_aside(path: Path, *, label: str) -> Iterator[Path]:
    """A file, if it is there, under a temporary name.

    At the end it goes back, unless it was given a name before; where its own is taken by then, it is removed.
    """
    tmp = _temporary_name(path, label)
    try:
        try:
            path.rename(tmp)
        except FileNotFoundError:
            pass  # somebody else has moved it
        except OSError as error:
            raise StorageError.from_os_error(error, path, "moving") from None
        yield tmp
    finally:
        with suppress(OSError):
            rename_noreplace(tmp, path)
        with suppress(OSError):
            tmp.unlink()


def _temporary_name(path: Path, label: str) -> Path:
    return path.with_name(f".{path.name}.{label}.{os.getpid()}-{os.urandom(4).hex()}{_TMP_SUFFIX}")


def _write_synced(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)  # may raise too: NFS reports a full disk or quota only here


def sync_dir(directory: Path) -> None:
    """Make the names in a directory durable; where a filesystem cannot sync directories, they are already."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def write_json(path: Path, document: Any, *, exclusive: bool = False, label: str = "new") -> None:
    """`write_atomic` of a JSON document as `json_bytes` writes it; raises as both."""
    write_atomic(path, json_bytes(document, path), exclusive=exclusive, label=label)


def json_bytes(document: Any, path: Path) -> bytes:
    """A JSON document as every file of a run holds it: indented, keys sorted.

    Args:
        path: where it is to lie, for the message.

    Raises:
        ValueError, TypeError: the document is not JSON (NaN included), or holds text that UTF-8 cannot write.
    """
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 20) : error.end]
        raise ValueError(
            f"{path}: half of a surrogate pair at {near!a}, which is no text; remove it from the value"
        ) from None


def make_dir(path: Path) -> None:
    """Make a directory of a run, if it is not there.

    Raises:
        CorruptError: something else, or a symbolic link, stands in its place.
        StorageError: the filesystem refused.
    """
    try:
        if not path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            sync_dir(path.parent)
    except (FileExistsError, NotADirectoryError):
        raise CorruptError(path, "a file stands where a directory should", "move it away") from None
    except OSError as error:
        raise StorageError.from_os_error(error, path, "making the directory") from None
    if path.is_symlink():
        raise CorruptError(path, "a symbolic link stands where a directory should", "move it away")


def list_dir(directory: Path) -> list[Path]:
    """What lies in a directory of a run, sorted by name; nothing where it is not there yet.

    Raises:
        CorruptError: a symbolic link or a file stands in the directory's place.
        StorageError: it cannot be listed.
    """
    if directory.is_symlink():
        raise CorruptError(directory, "a symbolic link stands where a directory should", "move it away")
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise CorruptError(directory, "a file stands where a directory should", "move it away") from None
    except OSError as error:
        raise StorageError.from_os_error(error, directory, "listing") from None


@contextmanager
def open_inside(root_dir: Path, path: Path) -> Iterator[BinaryIO]:
    """Open a regular file below ``root_dir`` for reading; no symbolic link between the two is followed.

    Raises:
        FileNotFoundError: it, or a directory above it, is not there.
        CorruptError: a link, a device, a pipe or a directory stands there, or ``..`` is in the path.
        StorageError: it cannot be opened.
        ValueError: ``path`` does not begin with ``root_dir``.
    """
    parts = path.relative_to(root_dir).parts
    if not parts or ".." in parts:
        raise CorruptError(path, f"is not a file below {root_dir}")
    try:
        fd = _open_each(root_dir, parts)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise CorruptError(path, "leads through a symbolic link or a file, which no run has") from None
        raise StorageError.from_os_error(error, path, "reading") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CorruptError(path, "is not a regular file")
    with os.fdopen(fd, "rb") as stream:
        yield stream


def _open_each(root_dir: Path, parts: tuple[str, ...]) -> int:
    """Open each directory relative to the one before, so that nobody can swap in a link in between."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    fd = os.open(root_dir, flags | os.O_DIRECTORY)
    for part in parts:
        # O_NONBLOCK: opening a named pipe must not wait for its writer
        kind = os.O_NONBLOCK if part is parts[-1] else os.O_DIRECTORY
        try:
            next_fd = os.open(part, flags | kind | os.O_NOFOLLOW, dir_fd=fd)
        finally:
            os.close(fd)
        fd = next_fd
    return fd


def read_inside(root_dir: Path, path: Path, *, max_bytes: int) -> bytes:
    """The bytes of a file below ``root_dir``; raises as `open_inside`, and CorruptError if it is larger."""
    with open_inside(root_dir, path) as stream:
        try:
            data = stream.read(max_bytes + 1)
        except OSError as error:
            raise StorageError.from_os_error(error, path, "reading") from None
    if len(data) > max_bytes:
        raise CorruptError(path, f"is larger than the {max_bytes} bytes that are allowed")
    return data


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES, *, root_dir: Path | None = None) -> Any:
    """A JSON document.

    Args:
        root_dir: the directory that no link may lead out of; the file's own directory by default.

    Raises:
        FileNotFoundError: it is not there.
        CorruptError: it is no JSON (torn, or NaN in it), too large, a link, or no regular file.
        StorageError: it cannot be read.
    """
    data = read_inside(root_dir or path.parent, path, max_bytes=max_bytes)
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        problem = "is empty" if not data.strip() else f"is not valid JSON ({error})"
        raise CorruptError(path, problem) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def sha256_file(path: Path, *, root_dir: Path | None = None) -> tuple[str, int]:
    """SHA-256 in hexadecimal digits, and the number of bytes; raises as `read_json` does."""
    digest, num_bytes = hashlib.sha256(), 0
    with open_inside(root_dir or path.parent, path) as stream:
        try:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                num_bytes += len(chunk)
        except OSError as error:
            raise StorageError.from_os_error(error, path, "reading") from None
    return digest.hexdigest(), num_bytes


def remove_temporaries(directory: Path, labels: set[str]) -> list[Path]:
    """Remove what crashes left of `write_atomic` under these labels; returns what was removed."""
    removed = []
    for path in list_dir(directory):
        parts = path.name.split(".")
        if (
            path.name.startswith(".")
            and path.suffix == _TMP_SUFFIX
            and len(parts) > 3
            and parts[-3] in labels
        ):
            with suppress(OSError):  # somebody else may have been quicker; a leftover does no harm
                path.unlink()
                removed.append(path)
    return removed
