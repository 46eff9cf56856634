"""Run:ai's answers as data: taken field by field, as documented; no live control plane was seen.

A list of workloads tells no labels. It may tell each workload's environment variables, the run document among
them; where it does not, ``GET /workloads/trainings/{id}`` tells labels and variables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from influence.rundir import RunDirError, RunSpec
from launcher.backends.run_document import VARIABLE
from launcher.backends.runai_refusals import one_line

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # goes into a path


class ShapeError(ValueError):
    """A field is missing, or not what it should be; the text says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """An entry of ``GET /workloads``."""

    id: str
    name: str
    project: str
    phase: str
    """Run:ai's word; empty where none is told."""
    message: str
    phase_reason: str
    created_at: str | None
    ended_at: str | None
    deleted_at: str | None
    """None where it is there."""
    num_pods: int | None
    """Pods that run; None where it is not told."""
    document: RunSpec | None
    """The run in its environment variables."""
    tells_variables: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The answer of ``GET /workloads/trainings/{id}``, as far as a run is concerned."""

    labels: Mapping[str, str]
    document: RunSpec | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """An entry of ``GET /workloads/{id}/pods``."""

    name: str
    node: str | None
    phase: str
    created_at: str | None
    ended_at: str | None


def workload(entry: Any) -> Workload:
    """Raises ShapeError."""
    fields = mapping(entry, "a workload")
    variables = fields.get("environmentVariables")
    return Workload(
        id=identifier(fields, "id"),
        name=text(fields, "name"),
        project=text(fields, "projectName"),
        phase=text_or_none(fields, "phase") or "",
        message=one_line(text_or_none(fields, "phaseMessage") or ""),
        phase_reason=text_or_none(fields, "phaseReason") or "",
        created_at=text_or_none(fields, "createdAt"),
        ended_at=text_or_none(fields, "completedAt"),
        deleted_at=text_or_none(fields, "deletedAt"),
        num_pods=_count_or_none(fields, "runningPods"),
        document=document_in(variables.get(VARIABLE)) if isinstance(variables, Mapping) else None,
        tells_variables=isinstance(variables, Mapping),
    )


def training(answer: Any) -> Training:
    """Raises ShapeError."""
    spec = mapping(mapping(answer, "a training").get("spec") or {}, "spec")
    variables = named(spec.get("environmentVariables"))
    return Training(labels=named(spec.get("labels")), document=document_in(variables.get(VARIABLE)))


def pod(entry: Any) -> Pod:
    """Raises ShapeError."""
    fields = mapping(entry, "a pod")
    return Pod(
        name=text(fields, "name"),
        node=text_or_none(fields, "nodeName"),
        phase=text_or_none(fields, "k8sPhase") or "",
        created_at=text_or_none(fields, "createdAt"),
        ended_at=text_or_none(fields, "completedAt"),
    )


def document_in(value: Any) -> RunSpec | None:
    """The run that an environment variable's text holds, None where it holds none.

    Kubernetes would halve ``$$``. That Run:ai gives a value back as it was given was not seen, so both
    readings are tried: the document's own hash tells which one is right.
    """
    if not isinstance(value, str):
        return None
    for reading in (value.replace("$$", "$"), value):
        try:
            return RunSpec.from_dict(json.loads(reading))
        except (ValueError, RecursionError, RunDirError):
            continue
    return None


def named(entries: Any) -> dict[str, str]:
    """``[{"name": .., "value": ..}]`` as a mapping; other entries (secrets, references) are left out."""
    if not isinstance(entries, list):
        return {}
    return {
        entry["name"]: entry["value"]
        for entry in entries
        if isinstance(entry, Mapping)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("value"), str)
    }


def mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ShapeError(f"{what} is no object")
    return value


def text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or not value:
        raise ShapeError(f"'{key}' is missing or no text")
    return value


def text_or_none(fields: Mapping[str, Any], key: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise ShapeError(f"'{key}' is no text")
    return value or None


def identifier(fields: Mapping[str, Any], key: str) -> str:
    """An id, which may be written as a number, and can stand in a path."""
    value = fields.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise ShapeError(f"'{key}' is missing or no id")
    return value


def _count_or_none(fields: Mapping[str, Any], key: str) -> int | None:
    value = fields.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
