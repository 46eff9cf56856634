"""Renders a job template: values enter the YAML through ``tojson`` only, and the result is parsed back.

A template cannot paste text: whatever an expression prints must come out of the filter ``tojson``, which
writes a value so that YAML reads back exactly that value. An undefined variable is an error wherever it is
used, even in a test or a loop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from traceback import walk_tb
from typing import Any

import jinja2

from launcher.errors import SpecError
from launcher.resources import templates_dir
from launcher.suggest import did_you_mean
from launcher.yaml_source import parse_yaml


class _Json(str):
    """Text that ``tojson`` wrote: the only thing a template may print."""

    __slots__ = ()


class _MissingError(jinja2.UndefinedError):
    """A template uses what is not among its values.

    Attributes:
        name: the variable or key.
        known: the names there are in its place.
    """

    def __init__(self, name: str, known: list[str] | None) -> None:
        super().__init__(f"'{name}' is undefined")
        self.name = name
        self.known = known


class _Missing(jinja2.StrictUndefined):
    """Jinja's strict undefined value, whose error also knows which names there would have been."""

    def __init__(
        self, hint: str | None = None, obj: Any = None, name: str | None = None, exc: Any = None
    ) -> None:
        known = list(map(str, obj)) if isinstance(obj, Mapping) else None
        super().__init__(hint, obj, name, exc=lambda message: _MissingError(str(name), known))  # type: ignore[arg-type]


class _TemplateMistakeError(Exception):
    """A template does what none may; the message says what."""


def tojson(value: Any) -> _Json:
    """A value as one line of JSON that YAML 1.1 and 1.2 read as the same value.

    Plain JSON is not enough: its escapes of characters beyond U+FFFF are two halves to YAML, and of the
    control characters YAML takes some only escaped. ``1e-06`` is text to YAML 1.1, ``1.0e-06`` a number.

    Raises:
        _TemplateMistakeError: a value that is no plain data, or holds what no YAML can (NUL, half a surrogate
            pair).
    """
    return _Json(_json(value))


def _json(value: Any) -> str:
    if isinstance(value, jinja2.Undefined):
        str(value)  # raises jinja2.UndefinedError
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float) and math.isfinite(value):
        digits, exponent, power = repr(float(value)).partition("e")
        return f"{digits}{'' if '.' in digits else '.0'}{exponent}{power}"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(key)}: {_json(below)}" for key, below in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_json, value)) + "]"
    raise _TemplateMistakeError(f"{type(value).__name__} is no value for YAML")


def _quoted(text: Any) -> str:
    if not isinstance(text, str):
        raise _TemplateMistakeError("a key must be text")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise _TemplateMistakeError("text with a NUL character or half of a surrogate pair")
    written = json.dumps(text, ensure_ascii=False)
    return "".join(c if _printable(c) else f"\\u{ord(c):04x}" for c in written)


def _printable(c: str) -> bool:
    """What stands in YAML for itself: no control, line separator, byte-order mark or non-character."""
    return not ("\x7f" <= c <= "\xa0" or c in "\u2028\u2029\ufeff\ufffe\uffff")


def env_value(text: str) -> str:
    """Text for a container's ``env`` or ``args``, where Kubernetes expands ``$(NAME)`` and halves ``$$``."""
    return text.replace("$", "$$")


def render_template(name: str, values: Mapping[str, Any], *, folder: Path | None = None) -> str:
    """Render ``templates/<name>``.

    Args:
        name: the template, such as ``kubernetes/job.yaml.j2``.
        values: its variables: plain data.
        folder: the templates' folder, by default the shipped one.

    Returns:
        YAML text of exactly one document, a mapping without duplicate keys.

    Raises:
        SpecError: no such template, a variable that is missing, or anything else wrong in the template, each
            with ``template:line``.
    """
    folder = templates_dir() if folder is None else folder
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=_Missing,
        finalize=_only_json,
        autoescape=False,  # noqa: S701 - the output is YAML, and `tojson` writes every value
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["tojson"] = tojson
    environment.filters["env_value"] = env_value
    try:
        text = environment.get_template(name).render(values)
    except jinja2.TemplateNotFound as error:
        raise SpecError(f"no template '{error.name}' in {folder}") from None
    except jinja2.TemplateSyntaxError as error:
        raise SpecError(
            f"{error.filename or name}:{error.lineno}: not a valid template: {error.message}"
        ) from None
    except _MissingError as error:
        known = list(values) if error.known is None else error.known
        raise SpecError(
            f"{_place(error, folder, name)}: {error}",
            why=did_you_mean(error.name, known) or f"there are {', '.join(known)}",
        ) from None
    except (_TemplateMistakeError, TypeError) as error:
        raise SpecError(f"{_place(error, folder, name)}: {error}") from None
    parse_manifest(text, name)
    return text


def parse_manifest(text: str, name: str) -> dict[str, Any]:
    """Rendered YAML as data; SpecError where it is not one mapping, with ``name`` and the rendered line."""
    data = parse_yaml(text, source=f"{name} as rendered").data
    if not isinstance(data, dict):
        raise SpecError(f"{name} as rendered: must be one mapping")
    return data


def _only_json(value: Any) -> Any:
    """Called by Jinja with every value that a template prints."""
    if isinstance(value, jinja2.Undefined):
        str(value)  # raises jinja2.UndefinedError
    if not isinstance(value, _Json):
        raise _TemplateMistakeError("prints a value that did not go through `| tojson`")
    return value


def _place(error: Exception, folder: Path, name: str) -> str:
    """``file:line`` of the template's line that raised; Jinja maps its generated code's lines back."""
    for frame, line in reversed(list(walk_tb(error.__traceback__))):
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(folder):
            return f"templates/{path.relative_to(folder)}:{line}"
    return f"templates/{name}"
