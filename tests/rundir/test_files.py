from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from influence.rundir import (
    CorruptError,
    StorageError,
    files,
    read_json,
    rename,
    sha256_file,
    write_atomic,
    write_json,
)

from .steps import tree


def test_a_written_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"one")
    write_atomic(tmp_path / "a", b"two")
    assert tree(tmp_path) == {"a": b"two"}


def test_exclusive_writing_never_replaces(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"one", exclusive=True)
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "a", b"two", exclusive=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "link", b"two", exclusive=True)
    assert tree(tmp_path) == {"a": b"one"} and not (tmp_path / "nowhere").exists()


def test_replacing_a_link_leaves_its_target_alone(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"target")
    (tmp_path / "a").symlink_to(tmp_path / "target")
    write_atomic(tmp_path / "a", b"ours")
    assert (tmp_path / "target").read_bytes() == b"target" and not (tmp_path / "a").is_symlink()


class Filesystem:
    """Between `files` and the system: records the order of operations, and fails where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.failures: dict[str, int] = {}
        for name in ("open", "write", "fsync", "close", "link", "replace"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))

    def _watched(self, name: str, real):
        def call(*args, **kwargs):
            self.calls.append(name)
            if name in self.failures:
                if name == "close":
                    real(*args, **kwargs)
                raise OSError(self.failures[name], os.strerror(self.failures[name]))
            return real(*args, **kwargs)

        return call


@pytest.fixture
def filesystem(monkeypatch: pytest.MonkeyPatch) -> Iterator[Filesystem]:
    yield Filesystem(monkeypatch)
    monkeypatch.undo()


def test_data_and_then_the_name_reach_the_disk(tmp_path: Path, filesystem: Filesystem) -> None:
    write_atomic(tmp_path / "a", b"x", exclusive=True)
    synced = [name for name in filesystem.calls if name not in ("open", "close")]
    assert synced == ["write", "fsync", "link", "fsync"]
    filesystem.calls.clear()
    write_atomic(tmp_path / "a", b"x")
    assert [name for name in filesystem.calls if name not in ("open", "close")] == [
        "write",
        "fsync",
        "replace",
        "fsync",
    ]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "input/output error"),
    ],
)
@pytest.mark.parametrize("operation", ["open", "write", "fsync", "close", "link"])
def test_every_refusal_of_the_system_is_a_storage_error_and_leaves_nothing(
    tmp_path: Path, filesystem: Filesystem, operation: str, number: int, words: str
) -> None:
    filesystem.failures[operation] = number
    with pytest.raises(StorageError) as error:
        write_atomic(tmp_path / "a", b"x", exclusive=True)
    filesystem.failures.clear()
    assert error.value.path == tmp_path / "a" and error.value.errno == number
    assert words in error.value.reason and error.value.next_step
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    assert tree(tmp_path) in ({}, {"a": b"x"})  # the second: only the directory's sync failed


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data[:3])))
    write_atomic(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_directories_that_cannot_be_synced_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "a", b"x")
    assert tree(tmp_path) == {"a": b"x"}


def test_a_filesystem_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    write_atomic(tmp_path / "a", b"one", exclusive=True)
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "a", b"two", exclusive=True)
    assert tree(tmp_path) == {"a": b"one"}

    def nothing_works(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "the filesystem has neither hard links nor exclusive renames")

    monkeypatch.setattr(rename, "_renameat2_noreplace", nothing_works)
    with pytest.raises(StorageError, match="neither hard links nor"):
        write_atomic(tmp_path / "b", b"one", exclusive=True)
    assert tree(tmp_path) == {"a": b"one"}


def test_a_link_that_was_made_although_the_reply_says_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link

    def link(*args: object, **kwargs: object) -> None:
        real(*args, **kwargs)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", link)
    write_atomic(tmp_path / "a", b"x", exclusive=True)
    assert tree(tmp_path) == {"a": b"x"}


# The system's own refusals: a full and a read-only filesystem (needs root), and a limit on file sizes.


def test_a_full_disk(small_filesystem: Path) -> None:
    write_atomic(small_filesystem / "kept", b"x" * 1000)
    with pytest.raises(StorageError, match="no space left on the device") as error:
        write_atomic(small_filesystem / "a", os.urandom(200_000))
    assert error.value.path == small_filesystem / "a"
    assert tree(small_filesystem) == {"kept": b"x" * 1000}
    write_atomic(small_filesystem / "a", b"fits")


def test_a_read_only_filesystem(small_filesystem: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_filesystem)], check=True)
    with pytest.raises(StorageError, match="read-only"):
        write_atomic(small_filesystem / "a", b"x")
    with pytest.raises(StorageError, match="making the directory failed: the filesystem is read-only"):
        files.make_dir(small_filesystem / "d")


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
from influence.rundir import StorageError, write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomic(Path(sys.argv[1]), b"x" * 10_000)
except StorageError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a")], check=True, capture_output=True, text=True
    )
    assert "the file would exceed the size limit" in result.stdout and str(tmp_path / "a") in result.stdout
    assert tree(tmp_path) == {}


# Reading.


def test_json_comes_back(tmp_path: Path) -> None:
    document = {"b": [1, 2.5, None, True, "ü\u2028"], "a": {"x": {}}}
    write_json(tmp_path / "a.json", document)
    assert read_json(tmp_path / "a.json") == document
    assert (tmp_path / "a.json").read_text().index('"a"') < (tmp_path / "a.json").read_text().index('"b"')
    with pytest.raises(ValueError):
        write_json(tmp_path / "b.json", {"x": float("nan")})
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 10_000, "not valid JSON"),
        (b"{}" + b" " * 3000, "larger than"),
    ],
)
def test_json_that_is_none_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CorruptError, match=words) as error:
        read_json(tmp_path / "a.json", max_bytes=3000 if b"   " in content else 10**6)
    assert error.value.path == tmp_path / "a.json"


def test_a_missing_file_is_the_callers_business(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError):
        sha256_file(tmp_path / "nothing" / "at-all")


def test_nothing_leads_out_of_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "steps").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text("{}")
    (run / "steps" / "link.json").symlink_to(tmp_path / "outside" / "secret.json")
    (run / "linked").symlink_to(tmp_path / "outside")
    (run / "plain.json").write_text("{}")
    for path in ("steps/link.json", "linked/secret.json", "plain.json/x.json", "../outside/secret.json"):
        with pytest.raises(CorruptError):
            read_json(run / path, root_dir=run)
    assert read_json(run / "plain.json", root_dir=run) == {}
    with pytest.raises(ValueError):
        read_json(tmp_path / "outside" / "secret.json", root_dir=run)


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    for name in ("pipe", "directory"):
        with pytest.raises(CorruptError, match="not a regular file"):
            read_json(tmp_path / name)
    with pytest.raises(CorruptError, match="symbolic link or a file"):
        read_json(tmp_path / "pipe" / "a.json", root_dir=tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


def test_digest_and_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # FIPS 180-4, the standard's own example
    assert sha256_file(tmp_path / "a") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        3,
    )


def test_only_leftovers_with_the_named_labels_go(tmp_path: Path) -> None:
    kept = ["a.npz", ".hidden", "b.attempt-0001.tmp", ".a.npz.attempt-0002.1-ff.tmp", ".x.tmp"]
    for name in [*kept, ".a.npz.attempt-0001.1-ff.tmp", ".a.json.attempt-0001.9-00.tmp"]:
        (tmp_path / name).touch()
    removed = files.remove_temporaries(tmp_path, {"attempt-0001"})
    assert len(removed) == 2 and sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    assert files.remove_temporaries(tmp_path / "nothing", {"attempt-0001"}) == []
