"""Checked access to the fields of a JSON document: a record is believed only field by field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from influence.rundir.clock import parse_time
from influence.rundir.errors import CorruptError, SchemaVersionError

_MAX_INT = 2**63 - 1
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Fields:
    """The fields of one document; whatever does not fit raises `CorruptError` naming file and field.

    Fields that nobody asks for are ignored, so that a later version may add some under the same schema
    version.
    """

    def __init__(self, document: Any, path: Path | None) -> None:
        self._path = path
        if not isinstance(document, dict):
            raise self.error("is not a JSON object")
        self._document = document

    def error(self, reason: str) -> CorruptError:
        return CorruptError(self._path, reason)

    def schema_version(self, supported: int) -> int:
        """Check it before any other field: the others may mean something else in another version."""
        found = self._get("schema_version")
        if type(found) is not int or found != supported:
            raise SchemaVersionError(self._path, "it has", found, supported)
        return found

    def integer(self, name: str, *, minimum: int = 0, maximum: int = _MAX_INT) -> int:
        value = self._get(name)
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.error(f"{name} is {_shown(value)}, not an integer from {minimum} to {maximum}")
        return value

    def boolean(self, name: str) -> bool:
        value = self._get(name)
        if not isinstance(value, bool):
            raise self.error(f"{name} is {_shown(value)}, not true or false")
        return value

    def text(self, name: str) -> str:
        value = self._get(name)
        if not isinstance(value, str):
            raise self.error(f"{name} is {_shown(value)}, not a string")
        return value

    def text_or_none(self, name: str) -> str | None:
        return None if self._document.get(name) is None else self.text(name)

    def integer_or_none(self, name: str, *, minimum: int = 0, maximum: int = _MAX_INT) -> int | None:
        if self._document.get(name) is None:
            return None
        return self.integer(name, minimum=minimum, maximum=maximum)

    def time(self, name: str) -> str:
        value = self.text(name)
        try:
            parse_time(value)
        except ValueError:
            raise self.error(f"{name} is {_shown(value)}, not a time in ISO 8601 with its zone") from None
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        value = self._get(name)
        if not isinstance(value, dict):
            raise self.error(f"{name} is {_shown(value)}, not an object")
        return value

    def array(self, name: str) -> list[Any]:
        value = self._get(name)
        if not isinstance(value, list):
            raise self.error(f"{name} is {_shown(value)}, not an array")
        return value

    def numbers(self, name: str) -> dict[str, float]:
        """A mapping of names to numbers, as `plain_numbers` wrote it."""
        numbers = {}
        for key, value in self.mapping(name).items():
            if isinstance(value, str) and value in _NONFINITE:
                numbers[key] = _NONFINITE[value]
            elif type(value) is float or (type(value) is int and abs(value) <= _MAX_INT):
                numbers[key] = float(value)
            else:
                raise self.error(f"{name}.{key} is {_shown(value)}, not a number")
        return numbers

    def _get(self, name: str) -> Any:
        if name not in self._document:
            raise self.error(f"{name} is missing")
        return self._document[name]


def plain_numbers(numbers: Mapping[str, float]) -> dict[str, float | str]:
    """Numbers as JSON has them; NaN and the infinities, which JSON lacks, as their JavaScript names."""
    plain: dict[str, float | str] = {}
    for name, value in numbers.items():
        number = float(value)
        if math.isfinite(number):
            plain[name] = number
        else:
            plain[name] = "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    return plain


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
