"""Checks plain data against ``Settings`` and tells what is wrong in the preset's own words."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from launcher.model.clusters import LauncherYaml
from launcher.model.rules import Problem, broken_rules
from launcher.model.sections import Settings
from launcher.suggest import did_you_mean

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping of settings",
    "model_type": "a mapping of settings",
    "model_attributes_type": "a mapping of settings",
}
_BOUNDS = {
    "greater_than": "greater than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}


def validate(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Check a merged preset.

    Args:
        data: the sections as plain data, without ``extends`` and ``description``.

    Returns:
        The settings as plain data in the schema's order and types (``damping: 1`` becomes 1.0), and the
        problems; the settings are empty where there is a problem.
    """
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        return {}, [_problem(details, Settings) for details in error.errors(include_url=False)]
    problems = broken_rules(settings)
    if problems:
        return {}, problems
    # Only a toleration has optional keys; what it leaves out stays out.
    return settings.model_dump(mode="json", exclude_unset=True), []


def validate_launcher_yaml(data: Mapping[str, Any]) -> tuple[LauncherYaml | None, list[Problem]]:
    """Check the merged content of ``launcher.yaml``; None where there is a problem."""
    try:
        return LauncherYaml.model_validate(data), []
    except ValidationError as error:
        return None, [_problem(details, LauncherYaml) for details in error.errors(include_url=False)]


def setting_names(path: tuple[str | int, ...] = (), schema: type[BaseModel] = Settings) -> list[str]:
    """The keys that the schema has at ``path``; none for a value or a free mapping."""
    section = _type_at(path, schema)
    if isinstance(section, type) and issubclass(section, BaseModel):
        return list(section.model_fields)
    return []


def _type_at(path: tuple[str | int, ...], schema: type[BaseModel]) -> Any:
    """The annotation of the setting at ``path`` without its ``| None``; None where the schema has nothing."""
    current: Any = schema
    for part in path:
        if get_origin(current) in (list, dict):
            current = get_args(current)[-1]
        elif isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = current.model_fields[str(part)].annotation
        else:
            return None
        if get_origin(current) in (Union, UnionType):
            current = next(kind for kind in get_args(current) if kind is not NoneType)
    return get_args(current)[0] if get_origin(current) is Annotated else current


def _problem(details: ErrorDetails, schema: type[BaseModel]) -> Problem:
    path, kind = details["loc"], details["type"]
    context = details.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(path, _unknown(path, schema))
    if kind == "missing":
        return Problem(path, "missing")
    if kind == "literal_error":
        return Problem(path, _not_a_choice(path, details["input"], schema))
    if kind in _EXPECTED:
        return Problem(path, f"must be {_EXPECTED[kind]}, not {_described(details['input'])}")
    if kind in _BOUNDS:
        return Problem(
            path, f"must be {_BOUNDS[kind]} {next(iter(context.values()))}, not {details['input']}"
        )
    if kind in ("string_too_short", "too_short"):
        return Problem(path, "must not be empty")
    return Problem(path, details["msg"])


def _unknown(path: tuple[str | int, ...], schema: type[BaseModel]) -> str:
    valid = setting_names(path[:-1], schema)
    return "no such setting; " + (did_you_mean(str(path[-1]), valid) or f"there are {', '.join(valid)}")


def _not_a_choice(path: tuple[str | int, ...], value: Any, schema: type[BaseModel]) -> str:
    choices = [str(choice) for choice in get_args(_type_at(path, schema))]
    hint = did_you_mean(value, choices) if isinstance(value, str) else ""
    return f"must be {' or '.join(choices)}, not {_described(value)}" + (f"; {hint}" if hint else "")


def _described(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 60 else f"a text of {len(value)} characters"
    return "a list" if isinstance(value, list) else "a mapping"
