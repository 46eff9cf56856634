"""A run in an object store: the run directory's layout, as keys (docs/storage.md).

Every object is written once, with put-if-absent, or by one attempt only. So an attempt that was thought dead
and wakes up can damage nothing that another one wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from influence.rundir import (
    AttemptRecord,
    CommitRecord,
    CorruptError,
    FencedError,
    RunPaths,
)
from influence.rundir.files import json_bytes
from influence.rundir.paths import ATTEMPT_RECORD, STEP_RECORD, attempt_label
from influence.store.objects import Entry, Objects


@dataclass(frozen=True, slots=True)
class RunStore:
    """A run below ``objects``, and the directory on this machine that stands for it."""

    objects: Objects
    paths: RunPaths

    @classmethod
    def of(cls, url: str, paths: RunPaths, *, patience_s: float) -> RunStore:
        """The run of these paths in the store at ``url``; raises as `Objects`."""
        return cls(Objects(f"{url.rstrip('/')}/{paths.name}", patience_s=patience_s), paths)

    def key(self, path: Path) -> str:
        """The key of a path in the run directory."""
        return path.relative_to(self.paths.root_dir).as_posix()

    def entries(self, directory: Path) -> dict[Path, Entry]:
        """The objects below a directory, as paths in it.

        An object whose key would lead out of the run directory is none of the run's.
        """
        found = {}
        for entry in self.objects.list(self.key(directory)):
            if not {"", ".", ".."} & set(entry.key.split("/")):
                found[self.paths.root_dir / entry.key] = entry
        return found

    def attempt_numbers(self) -> list[int]:
        """The attempts that have claimed a number, in increasing order."""
        names = (path.name for path in self.entries(self.paths.attempts_dir))
        return sorted(int(match[1]) for name in names if (match := ATTEMPT_RECORD.fullmatch(name)))

    def reserve(self, record: AttemptRecord) -> bool:
        """Claim an attempt's number, exclusively among all machines; False: it is taken."""
        path = self.paths.attempt(record.number)
        try:
            self.objects.create(self.key(path), json_bytes(record.to_dict(), path))
        except FileExistsError:
            return False
        return True

    def require_unfenced(self, number: int) -> None:
        """Raises FencedError where a later attempt has taken over, on whatever machine."""
        highest = max(self.attempt_numbers(), default=0)
        if highest > number:
            raise FencedError(self.paths.attempt(highest), number, highest)

    def announcement(self, record: CommitRecord) -> str:
        """The key under which an attempt says what it is about to commit."""
        path = self.paths.step_record(record.step)
        return self.key(path.with_name(f".{path.name}.{attempt_label(record.attempt)}"))

    def announcements(self, step: int) -> list[Entry]:
        """What attempts have said they would commit as this step, the latest attempt first."""
        path = self.paths.step_record(step)
        found = self.entries(path.parent)
        names = sorted((p for p in found if p.name.startswith(f".{path.name}.attempt-")), reverse=True)
        return [found[name] for name in names]

    def record(self, path: Path) -> CommitRecord | None:
        """The commit record under this path; None where there is none.

        Raises:
            CorruptError, SchemaVersionError: it is none that could be used.
        """
        try:
            return parse_record(self.objects.read(self.key(path)), path)
        except FileNotFoundError:
            return None


def parse_record(data: bytes, path: Path) -> CommitRecord:
    """A commit record's bytes, checked; ``path`` is for the messages. Raises as `RunStore.record`."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise CorruptError(path, "is not valid JSON in the object store") from None
    return CommitRecord.from_dict(document, path)


def step_of(path: Path) -> int | None:
    """The step whose commit record has this name."""
    match = STEP_RECORD.fullmatch(path.name)
    return int(match[1]) if match else None


def orphans(paths: RunPaths, found: Iterable[Path]) -> list[int]:
    """The steps with an NPZ and without a record, of what a listing of ``steps/`` found."""
    names = {path.name for path in found}
    steps = (re.fullmatch(r"step_([0-9]+)\.npz", name) for name in names)
    return sorted(
        int(match[1]) for match in steps if match and paths.step_record(int(match[1])).name not in names
    )
