"""Several objects of one run: a run that ended and is submitted again becomes the next generation.

Nothing is deleted for it. The first object has the run's name, the second ``<run>-r2``, the third
``<run>-r3``; all of them carry the run's name as a label. Since the name follows from what is there, two
submits at once try to create the same object, and one of them does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.kubernetes_values import RUN_LABEL

_SUFFIX = re.compile(r"-r([2-9]|[1-9][0-9]+)")


@dataclass(frozen=True, slots=True)
class Generation:
    """One object of a run."""

    number: int
    """From 1."""
    item: Mapping[str, Any]
    """The object as the server has it."""

    @property
    def run(self) -> str:
        """The run that the object's label names."""
        return str((self.item["metadata"].get("labels") or {}).get(RUN_LABEL))

    @property
    def name(self) -> str:
        """The object's name."""
        return str(self.item["metadata"]["name"])


def object_name(run: str, number: int) -> str:
    """The name of a run's object of that generation."""
    return run if number == 1 else f"{run}-r{number}"


def generation_number(run: str, name: str) -> int | None:
    """Which generation of the run has this name; None where it is no name of the run's objects."""
    if name == run:
        return 1
    match = _SUFFIX.fullmatch(name.removeprefix(run)) if name.startswith(run) else None
    return int(match[1]) if match else None


def generations_by_run(items: Iterable[Mapping[str, Any]]) -> dict[str, list[Generation]]:
    """The objects of each run, the oldest generation first.

    What has no label of a run is left out, and so is what another object owns, or what has a name that no
    object of the run has: controllers copy labels to the objects that they make.
    """
    found: dict[str, list[Generation]] = {}
    for item in items:
        metadata = item.get("metadata") or {}
        run = (metadata.get("labels") or {}).get(RUN_LABEL)
        if not isinstance(run, str) or _owned(metadata):
            continue
        number = generation_number(run, str(metadata.get("name", "")))
        if number is not None:
            found.setdefault(run, []).append(Generation(number, item))
    for generations in found.values():
        generations.sort(key=lambda generation: generation.number)
    return found


def _owned(metadata: Mapping[str, Any]) -> bool:
    """Whether a controller made the object: KubeRay's submitter Job carries its RayJob's name and labels."""
    return any(reference.get("controller") for reference in metadata.get("ownerReferences") or [])
