"""Checkpoints in the store: complete ones only, each in a folder of the attempt that wrote it.

A checkpoint is many files, so it cannot come to be at once: its manifest, written last, says that it is
complete and what each file must be. Attempts do not share a folder, so the files of two never mix.

::

    checkpoints/attempt-0002/step_000006/...      verl's files, the content of its global_step_6
    checkpoints/attempt-0002/step_000006.json     the manifest
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from influence.rundir import CorruptError, StorageError, sha256_file
from influence.rundir.fields import Fields
from influence.rundir.files import json_bytes
from influence.rundir.paths import ATTEMPT_DIGITS, attempt_label
from influence.rundir.spec import SCHEMA_VERSION
from influence.store.run_store import RunStore, step_of

_NUM_AT_ONCE = 4
_SENDING = ".sending"
_PART = ".part"
_ATTEMPT_DIR = re.compile(rf"attempt-{ATTEMPT_DIGITS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCheckpoint:
    """A manifest: a checkpoint that lies in the store as a whole."""

    step: int
    attempt: int
    folder: str
    """The name of verl's folder."""
    files: dict[str, tuple[int, str]]
    """Relative path to bytes and SHA-256."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "step": self.step,
            "attempt": self.attempt,
            "folder": self.folder,
            "files": {name: list(value) for name, value in self.files.items()},
        }

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> StoredCheckpoint:
        """Check a manifest; ``path`` is for the messages.

        Raises:
            CorruptError, SchemaVersionError: it is none that could be used.
        """
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            raise CorruptError(path, "is not valid JSON in the object store") from None
        fields = Fields(document, path)
        fields.schema_version(SCHEMA_VERSION)
        files: dict[str, tuple[int, str]] = {}
        for name, value in fields.mapping("files").items():
            if not (isinstance(value, list) and len(value) == 2 and type(value[0]) is int):
                raise fields.error(f"files holds {ascii(value)[:80]}, not [bytes, SHA-256]")
            files[_inner(name, fields)] = (value[0], str(value[1]))
        return cls(
            step=fields.integer("step", minimum=1),
            attempt=fields.integer("attempt", minimum=1),
            folder=_inner(fields.text("folder"), fields),
            files=files,
        )


def _inner(name: str, fields: Fields) -> str:
    """A relative path that stays where it is put."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise fields.error(f"names the file {ascii(name)[:80]}, which leads elsewhere")
    return name


def _manifests(found: Iterable[Path]) -> list[Path]:
    """Of all attempts, the newest first."""
    manifests = [path for path in found if step_of(path) and _ATTEMPT_DIR.fullmatch(path.parent.name)]
    return sorted(manifests, key=lambda path: (step_of(path) or 0, path.parent.name), reverse=True)


def _attempt_of(run: RunStore, path: Path) -> int:
    """The attempt that an object below ``checkpoints/`` belongs to; 0: none."""
    match = _ATTEMPT_DIR.fullmatch(path.relative_to(run.paths.checkpoints_dir).parts[0])
    return int(match[1]) if match else 0


def send(run: RunStore, attempt: int, step: int, folder: Path, is_newest: Callable[[], bool]) -> bool:
    """Send a finished checkpoint; False where there is a newer one by now, so that verl may remove this one.

    Args:
        is_newest: asked when the files are pinned. Until then verl has removed none of the newest.

    Raises:
        StoreError: the store does not take it. StorageError: it cannot be read.
    """
    manifest = run.paths.checkpoints_dir / attempt_label(attempt) / run.paths.step_record(step).name
    with _pinned(folder) as pinned:
        if pinned is None or not is_newest():
            return False
        names = sorted(path.relative_to(pinned).as_posix() for path in pinned.rglob("*") if path.is_file())

        def send_file(name: str) -> tuple[str, tuple[int, str]]:
            sha256, num_bytes = sha256_file(pinned / name)
            run.objects.put(run.key(manifest.with_suffix("") / name), pinned / name)
            return name, (num_bytes, sha256)

        with ThreadPoolExecutor(_NUM_AT_ONCE) as pool:
            files = dict(pool.map(send_file, names))
    stored = StoredCheckpoint(step=step, attempt=attempt, folder=folder.name, files=files)
    run.objects.put(run.key(manifest), json_bytes(stored.to_dict(), manifest))
    return True


@contextmanager
def _pinned(folder: Path) -> Iterator[Path | None]:
    """The folder's files under second names, so that verl may remove the first while they are sent."""
    pinned = folder.parent / _SENDING / folder.name
    try:
        shutil.rmtree(pinned, ignore_errors=True)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                link = pinned / path.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.hardlink_to(path)
    except FileNotFoundError:
        yield None
    except OSError as error:
        raise StorageError.from_os_error(error, folder, "linking") from None
    else:
        yield pinned
    finally:
        shutil.rmtree(pinned, ignore_errors=True)


def prune(run: RunStore, attempt: int, keep: int) -> None:
    """Remove all but the newest ``keep`` complete checkpoints, and files that belong to none.

    Of this attempt and lower ones only: a later one may be sending. A manifest goes before its files, since
    without it they are no checkpoint.

    Raises:
        StoreError: the store refuses.
    """
    found = run.entries(run.paths.checkpoints_dir)
    manifests = _manifests(found)
    kept = {path.with_suffix("") for path in manifests[:keep]}
    doomed = [path for path in manifests[keep:] if _attempt_of(run, path) <= attempt]
    doomed += [
        path
        for path in found
        if path not in manifests and _attempt_of(run, path) <= attempt and not kept & set(path.parents)
    ]
    run.objects.delete(run.key(path) for path in doomed)


def restore(
    run: RunStore, first_missing_step: int, say: Callable[[str], None], stop: Callable[[], bool]
) -> int:
    """Bring the newest checkpoint that a resume can use; what is damaged is named and passed over.

    Args:
        first_missing_step: from a later checkpoint this step would never be computed.
        stop: asked between pieces whether to give up.

    Returns:
        Its step; 0 where there is none.

    Raises:
        InterruptedError: ``stop`` said so. StoreError, StorageError.
    """
    for path in _manifests(run.entries(run.paths.checkpoints_dir)):
        if (step_of(path) or 0) >= first_missing_step:
            continue
        try:
            stored = StoredCheckpoint.from_bytes(run.objects.read(run.key(path)), path)
            _bring(run, path, stored, stop)
            return stored.step
        except (CorruptError, FileNotFoundError) as error:
            say(f"a checkpoint in the store cannot be used: {error}")
    return 0


def _bring(run: RunStore, manifest: Path, stored: StoredCheckpoint, stop: Callable[[], bool]) -> None:
    """A checkpoint to its place on this machine, under its name only when every file is there and right.

    Raises:
        CorruptError: a file is not what the manifest says. FileNotFoundError: one is not there.
    """
    folder = run.paths.checkpoints_dir / stored.folder
    part = run.paths.checkpoints_dir / _PART / stored.folder

    def bring(name: str) -> None:
        target, key = part / name, run.key(manifest.with_suffix("") / name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as stream:

            def write(chunk: bytes) -> None:
                if stop():
                    raise InterruptedError
                stream.write(chunk)

            sha256, num_bytes = run.objects.digest(key, write)
        if (num_bytes, sha256) != stored.files[name]:
            raise CorruptError(manifest, f"names {name}, which is not what was sent")

    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        with ThreadPoolExecutor(_NUM_AT_ONCE) as pool:
            list(pool.map(bring, stored.files))
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    except (InterruptedError, FileNotFoundError):
        raise
    except OSError as error:
        raise StorageError.from_os_error(error, folder, "writing") from None
    finally:
        shutil.rmtree(part.parent, ignore_errors=True)
