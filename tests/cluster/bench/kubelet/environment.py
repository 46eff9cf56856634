"""The variables of a container, as the API's documentation defines them."""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.cluster.bench.controlplane import CHECKOUT

Json = dict[str, Any]
#: ("secrets" | "configmaps", name) -> the object, or None
Lookup = Callable[[str, str], Json | None]

_INHERITED = ("LANG", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
_NODE_ADDRESS = "127.0.0.1"
_REFERENCE = re.compile(r"\$\$|\$\(([-._a-zA-Z][-._a-zA-Z0-9]*)\)")
_MAP_ENTRY = re.compile(r"metadata\.(labels|annotations)\['(.+)'\]")


def of_image(folder: Path) -> dict[str, str]:
    """What an image sets: the tests' own Python and this checkout, and before them the image's programs."""
    path = (str(folder / "bin"), str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return {"PATH": ":".join(path), "PYTHONPATH": str(CHECKOUT), **inherited}


def expand(text: str, variables: Mapping[str, str]) -> str:
    """``$(NAME)`` is replaced where the variable exists and stays as it is where not; ``$$`` is a dollar."""

    def replacement(match: re.Match[str]) -> str:
        name = match[1]
        return "$" if name is None else variables.get(name, match[0])

    return _REFERENCE.sub(replacement, text)


def variables(pod: Json, container: Json, lookup: Lookup) -> dict[str, str]:
    """What the container's own ``env`` and ``envFrom`` say, later ones referring to earlier ones.

    Raises:
        LookupError: a Secret, a ConfigMap or a key that is not optional isn't there.
    """
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        kind, reference = (
            ("secrets", source["secretRef"])
            if "secretRef" in source
            else ("configmaps", source["configMapRef"])
        )
        values = _values(kind, lookup(kind, reference["name"]))
        if values is None and not reference.get("optional"):
            raise LookupError(f'{kind.removesuffix("s")} "{reference["name"]}" not found')
        for name, value in (values or {}).items():
            found[source.get("prefix", "") + name] = value
    for entry in container.get("env", []):
        if "valueFrom" not in entry:
            found[entry["name"]] = expand(entry.get("value", ""), found)
            continue
        referred = _value_from(entry["valueFrom"], pod, container, lookup)
        if referred is not None:
            found[entry["name"]] = referred
    return found


def _value_from(source: Json, pod: Json, container: Json, lookup: Lookup) -> str | None:
    if "fieldRef" in source:
        return _field(pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        kind, _, resource = source["resourceFieldRef"]["resource"].partition(".")
        return str(container.get("resources", {}).get(kind, {}).get(resource, "0"))
    kind, reference = (
        ("secrets", source["secretKeyRef"])
        if "secretKeyRef" in source
        else ("configmaps", source["configMapKeyRef"])
    )
    values = _values(kind, lookup(kind, reference["name"]))
    if values is not None and reference["key"] in values:
        return values[reference["key"]]
    if reference.get("optional"):
        return None
    if values is None:
        raise LookupError(f'{kind.removesuffix("s")} "{reference["name"]}" not found')
    raise LookupError(f"couldn't find key {reference['key']} in {kind.removesuffix('s')} {reference['name']}")


def _field(pod: Json, path: str) -> str:
    if match := _MAP_ENTRY.fullmatch(path):
        return str(pod["metadata"].get(match[1], {}).get(match[2], ""))
    if path in ("status.podIP", "status.podIPs", "status.hostIP", "status.hostIPs"):
        return _NODE_ADDRESS
    value: Any = pod
    for part in path.split("."):
        value = value.get(part, {})
    return str(value or "")


def _values(kind: str, found: Json | None) -> dict[str, str] | None:
    if found is None:
        return None
    data: dict[str, str] = found.get("data", {})
    if kind == "configmaps":
        return data
    return {key: base64.b64decode(value).decode() for key, value in data.items()}
