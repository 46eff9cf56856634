"""``run.json``: what a run is. The resolved spec, its hash, its origin; written once, by whoever is first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from influence.rundir.errors import ConflictError, CorruptError, NotARunError
from influence.rundir.fields import Fields
from influence.rundir.files import make_dir, read_json, write_json
from influence.rundir.paths import RunPaths

SCHEMA_VERSION = 1
"""Of ``run.json``, the attempt records and the commit records together."""

_ABSENT = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """The content of ``run.json``."""

    run: str
    """The run's name."""
    spec: dict[str, Any]
    """The resolved spec, without secrets and times: equal settings and code give an equal spec."""
    spec_hash: str
    """`spec_hash` of ``spec``."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Who submitted it, when, from where: whatever does not make it another run."""
    wandb: dict[str, Any] = field(default_factory=dict)
    """``mode``, ``entity``, ``project``, ``run_id``, ``url``."""
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def new(
        cls,
        run: str,
        spec: Mapping[str, Any],
        *,
        provenance: Mapping[str, Any] | None = None,
        wandb: Mapping[str, Any] | None = None,
    ) -> RunSpec:
        """A spec together with its hash."""
        return cls(
            run=run,
            spec=dict(spec),
            spec_hash=spec_hash(spec),
            provenance=dict(provenance or {}),
            wandb=dict(wandb or {}),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "spec": self.spec,
            "spec_hash": self.spec_hash,
            "provenance": self.provenance,
            "wandb": self.wandb,
            "schema_version": self.schema_version,
        }

    @classmethod
    def from_dict(cls, document: Any, path: Path | None = None) -> RunSpec:
        """Check a document and take it.

        Args:
            path: where the document lies, for the messages.

        Raises:
            SchemaVersionError: written by another version.
            CorruptError: a field is missing or wrong, or the hash is not that of the spec.
        """
        fields = Fields(document, path)
        run_spec = cls(
            schema_version=fields.schema_version(SCHEMA_VERSION),
            run=fields.text("run"),
            spec=fields.mapping("spec"),
            spec_hash=fields.text("spec_hash"),
            provenance=fields.mapping("provenance"),
            wandb=fields.mapping("wandb"),
        )
        try:
            canonical_json(run_spec.to_dict() | {"spec": None})
            actual = spec_hash(run_spec.spec)
        except (ValueError, RecursionError) as error:
            raise fields.error(f"has text or numbers that could not have been written ({error})") from None
        if actual != run_spec.spec_hash:
            raise fields.error(
                f"spec_hash is {run_spec.spec_hash[:80]!a}, the spec's is {actual}: one was altered"
            )
        return run_spec


def canonical_json(obj: Any) -> bytes:
    """The one way to write a value: sorted keys, no spaces, UTF-8.

    Raises:
        ValueError: NaN, an infinity, or text that UTF-8 cannot write.
        TypeError: a value that JSON does not have, or a key that is no string (JSON would turn it into one,
            and the value read back would be another one).
    """
    _require_text_keys(obj)
    return json.dumps(
        obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def _require_text_keys(obj: Any) -> None:
    values = obj
    if isinstance(obj, dict):
        for key in obj:
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no string")
        values = obj.values()
    elif not isinstance(obj, (list, tuple)):
        return
    for value in values:
        if isinstance(value, (dict, list, tuple)):  # a status of hundreds of runs asks this of every leaf
            _require_text_keys(value)


def spec_hash(spec: Mapping[str, Any]) -> str:
    """``sha256:<hexadecimal digits>`` of the spec's canonical JSON."""
    return "sha256:" + hashlib.sha256(canonical_json(dict(spec))).hexdigest()


def create_run(paths: RunPaths, run_spec: RunSpec) -> bool:
    """Make the run directory with this spec, or adopt the one that is there.

    Two creators at once: one creates, the other adopts or is refused; ``run.json`` is never replaced.

    Returns:
        True where this call created ``run.json``, False where it was there with the same hash.

    Raises:
        ConflictError: another run has this name; nothing was changed.
        SchemaVersionError, CorruptError: the ``run.json`` there cannot be compared with.
        StorageError: the filesystem refused.
        ValueError: the hash is not that of the spec, or the directory has another run's name.
    """
    if spec_hash(run_spec.spec) != run_spec.spec_hash:
        raise ValueError(
            f"spec_hash {run_spec.spec_hash} is not that of the spec: {spec_hash(run_spec.spec)}"
        )
    if run_spec.run != paths.name:
        raise ValueError(f"the run {run_spec.run!r} cannot lie in a directory named {paths.name!r}")
    make_dir(paths.root_dir)
    try:
        write_json(paths.run_json, run_spec.to_dict(), exclusive=True)
        created = True
    except FileExistsError:
        created = False
        existing = read_run(paths)
        if existing.spec_hash != run_spec.spec_hash:
            raise ConflictError(paths.run_json, difference(existing.spec, run_spec.spec)) from None
    for directory in (
        paths.attempts_dir,
        paths.logs_dir,
        paths.metrics_dir,
        paths.steps_dir,
        paths.checkpoints_dir,
    ):
        make_dir(directory)
    return created


def read_run(paths: RunPaths) -> RunSpec:
    """The content of ``run.json``, checked.

    Raises:
        NotARunError: there is none.
        SchemaVersionError: another version wrote it.
        CorruptError: it is not what `create_run` wrote, or is of the run of another directory.
    """
    try:
        document = read_json(paths.run_json)
    except FileNotFoundError:
        raise NotARunError(
            paths.root_dir, "is not a run: it has no run.json", "check the name and the root of the runs"
        ) from None
    run_spec = RunSpec.from_dict(document, paths.run_json)
    # Resolved, so that `.` and a link to a run are fine.
    name = paths.root_dir.resolve().name
    if run_spec.run != name:  # two directories that both go on as one run: one W&B run, one copy
        raise CorruptError(
            paths.run_json,
            f"is of the run {run_spec.run[:80]!a}, but lies in {name!a}",
            f"give the directory its name back, {run_spec.run[:80]!a}, or submit a run of the new name",
        )
    return run_spec


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What differs from ``a`` to ``b``, a line a value: ``influence.damping: 0.1 -> 0.2``.

    Values are compared as canonical JSON writes them, like the hashes: 1, 1.0 and true are three values.
    """
    before, after = dict(_leaves(a)), dict(_leaves(b))
    lines = []
    for place in sorted(before.keys() | after.keys()):
        old, new = _shown(before.get(place, _ABSENT)), _shown(after.get(place, _ABSENT))
        if old != new:
            lines.append(f"{'.'.join(place)}: {old} -> {new}")
    return lines


def _leaves(mapping: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, key))
        else:
            yield (*above, key), value


def _shown(value: Any) -> str:
    """One line, ASCII: control characters in a spec must not reach a terminal."""
    return "(absent)" if value is _ABSENT else json.dumps(value, sort_keys=True)
