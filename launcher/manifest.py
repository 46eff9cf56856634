"""``manifest.json``: what a collected copy holds, what was found wrong, and what its score files contain.

It is written last and names every file that was verified. A file that lies in the folder and not in the
manifest was not verified (an interrupted collect); the next collect looks at it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from influence.rundir.errors import CorruptError, SchemaVersionError
from influence.rundir.fields import Fields, plain_numbers
from influence.rundir.files import read_json, write_json
from launcher.copying import Fingerprint

MANIFEST_NAME = "manifest.json"
MANIFEST_SCHEMA_VERSION = 1


class Problem(StrEnum):
    """What can be wrong with a file."""

    MISSING = "missing"
    """It should be there and is not."""
    TORN = "torn"
    """Shorter or longer than its commit record says, or cut off."""
    CORRUPT = "corrupt"
    """The right size, or no size to compare with, and the wrong content."""
    FOREIGN = "foreign"
    """Sound, but not of this run: another spec hash, a step that the run does not have, a link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A verified file of the collected copy."""

    file: str
    """Relative to the collected run, with ``/``."""
    num_bytes: int
    sha256: str
    step: int | None = None
    attempt: int | None = None

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.num_bytes, self.sha256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that is not as it should be."""

    problem: Problem
    file: str
    reason: str
    step: int | None = None
    attempt: int | None = None
    harmless: bool = False
    """The collected copy has a good version of this very file, so nothing is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreFacts:
    """What one score file contains, counted when it was verified."""

    sha256: str
    """Of the file that was counted."""
    num_rows: int
    num_scored_rows: int
    """Rows of groups with a contrast; the scores of the others are 0 by definition."""
    num_accepted_rows: int
    num_groups: int
    num_positions: int
    """Tokens with a score: the valid positions."""
    num_expected_positions: int
    """What the responses' lengths and the cap on tokens say ``num_positions`` should be."""
    num_nan: int
    """NaN among the valid positions."""
    num_infinite: int
    num_nonzero: int
    quantiles: Mapping[str, float]
    """``min``, ``median`` and ``max`` of the finite scores of scored rows; empty where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of ``manifest.json``."""

    run: str
    spec_hash: str
    source: str
    """The run directory that was read, as an absolute path."""
    collected_at: str
    """When a collect last changed anything here."""
    num_total_steps: int
    files: tuple[FileEntry, ...]
    findings: tuple[Finding, ...] = ()
    scores: Mapping[str, ScoreFacts] = field(default_factory=dict)
    """By score file."""

    @property
    def state(self) -> str:
        """``complete``, ``incomplete`` (something is missing) or ``damaged`` (torn, corrupt, foreign)."""
        problems = {finding.problem for finding in self.findings if not finding.harmless}
        if not problems:
            return "complete"
        return "incomplete" if problems == {Problem.MISSING} else "damaged"

    def entry(self, file: str) -> FileEntry | None:
        return next((entry for entry in self.files if entry.file == file), None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": MANIFEST_SCHEMA_VERSION,
            "run": self.run,
            "spec_hash": self.spec_hash,
            "source": self.source,
            "collected_at": self.collected_at,
            "total_steps": self.num_total_steps,
            "state": self.state,
            "files": [
                {
                    "file": entry.file,
                    "bytes": entry.num_bytes,
                    "sha256": entry.sha256,
                    "step": entry.step,
                    "attempt": entry.attempt,
                }
                for entry in self.files
            ],
            "findings": [asdict(finding) for finding in self.findings],
            "scores": {
                file: asdict(facts) | {"quantiles": plain_numbers(facts.quantiles)}
                for file, facts in self.scores.items()
            },
        }

    @classmethod
    def from_dict(cls, document: Any, path: Path) -> Manifest:
        """Check a document and take it; raises as `read_manifest`."""
        fields = Fields(document, path)
        fields.schema_version(MANIFEST_SCHEMA_VERSION)
        return cls(
            run=fields.text("run"),
            spec_hash=fields.text("spec_hash"),
            source=fields.text("source"),
            collected_at=fields.time("collected_at"),
            num_total_steps=fields.integer("total_steps"),
            files=tuple(_file_entry(Fields(entry, path)) for entry in fields.array("files")),
            findings=tuple(_finding(Fields(entry, path)) for entry in fields.array("findings")),
            scores={
                file: _score_facts(Fields(facts, path)) for file, facts in fields.mapping("scores").items()
            },
        )


def read_manifest(run_dir: Path) -> Manifest | None:
    """The manifest of a collected run; None where there is none.

    Raises:
        CorruptError: it is not what `write_manifest` wrote.
        SchemaVersionError: another version wrote it.
        StorageError: it cannot be read.
    """
    path = run_dir / MANIFEST_NAME
    try:
        document = read_json(path, _MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        return None
    return Manifest.from_dict(document, path)


def write_manifest(run_dir: Path, manifest: Manifest) -> Manifest:
    """Write the manifest, unless the one that is there says the same; returns the one that is there then.

    A collect that changed nothing leaves the very bytes of the one before, its time included.
    """
    try:
        existing = read_manifest(run_dir)
    except (CorruptError, SchemaVersionError):
        existing = None
    if existing is not None and replace(existing, collected_at=manifest.collected_at) == manifest:
        return existing
    write_json(run_dir / MANIFEST_NAME, manifest.to_dict())
    return manifest


_MAX_MANIFEST_BYTES = 1 << 28


def _file_entry(fields: Fields) -> FileEntry:
    return FileEntry(
        file=fields.text("file"),
        num_bytes=fields.integer("bytes"),
        sha256=fields.text("sha256"),
        step=fields.integer_or_none("step"),
        attempt=fields.integer_or_none("attempt"),
    )


def _finding(fields: Fields) -> Finding:
    try:
        problem = Problem(fields.text("problem"))
    except ValueError as error:
        raise fields.error(str(error)) from None
    return Finding(
        problem=problem,
        file=fields.text("file"),
        reason=fields.text("reason"),
        step=fields.integer_or_none("step"),
        attempt=fields.integer_or_none("attempt"),
        harmless=fields.boolean("harmless"),
    )


def _score_facts(fields: Fields) -> ScoreFacts:
    return ScoreFacts(
        sha256=fields.text("sha256"),
        num_rows=fields.integer("num_rows"),
        num_scored_rows=fields.integer("num_scored_rows"),
        num_accepted_rows=fields.integer("num_accepted_rows"),
        num_groups=fields.integer("num_groups"),
        num_positions=fields.integer("num_positions"),
        num_expected_positions=fields.integer("num_expected_positions"),
        num_nan=fields.integer("num_nan"),
        num_infinite=fields.integer("num_infinite"),
        num_nonzero=fields.integer("num_nonzero"),
        quantiles=fields.numbers("quantiles"),
    )
