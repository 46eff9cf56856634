"""Fields of the API's JSON, whatever stands there: what is missing, or of another type, counts as absent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def mapping(above: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object; empty where there is none."""
    value = above.get(key)
    return value if isinstance(value, Mapping) else {}


def mappings(above: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The objects of a list; empty where there is none."""
    value = above.get(key)
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []


def text(above: Mapping[str, Any], key: str) -> str | None:
    """A text as it stands there, be it empty."""
    value = above.get(key)
    return value if isinstance(value, str) else None


def count(above: Mapping[str, Any], key: str) -> int:
    """A number of things; 0 where there is none."""
    value = above.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
