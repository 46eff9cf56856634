"""Giving a file a name that nobody has yet, on every filesystem that can do so atomically."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_CANNOT_LINK = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def rename_noreplace(tmp: Path, path: Path) -> None:
    """`os.rename`, but never over a file that is there; both names on one filesystem.

    A hard link fails where the name is taken, atomically, on local filesystems and on NFS. Some FUSE and SMB
    mounts have no hard links; Linux's ``renameat2`` serves there.

    Raises:
        FileExistsError: the name is taken.
        OSError: anything else; ENOTSUP where the filesystem can do neither.
    """
    try:
        os.link(tmp, path, follow_symlinks=False)
    except FileExistsError:
        # NFS repeats a request whose reply was lost: the second time our own link is in the way.
        if not _same_file(tmp, path):
            raise
        _remove(tmp)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        _renameat2_noreplace(tmp, path)
    else:
        _remove(tmp)


def _remove(tmp: Path) -> None:
    with suppress(OSError):  # the new name is there, and that is what was asked for
        tmp.unlink()


def _same_file(one: Path, other: Path) -> bool:
    try:
        return os.path.samestat(one.lstat(), other.lstat())
    except FileNotFoundError:
        return False


def _renameat2_noreplace(tmp: Path, path: Path) -> None:
    import ctypes  # 10 ms that most filesystems never need

    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOTSUP, "the filesystem has no hard links", str(path))
    if renameat2(_AT_FDCWD, os.fsencode(tmp), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE) == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS):
        raise OSError(errno.ENOTSUP, "the filesystem has neither hard links nor exclusive renames", str(path))
    raise OSError(number, os.strerror(number), str(path))
