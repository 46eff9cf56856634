"""YAML that people write, read with the place of every value, so that an error can say ``file:line``.

A strict subset of YAML 1.2: one document, text keys, plain data. Refused, each with its line: duplicate
keys, anchors and aliases (a few lines of them expand to gigabytes), tags (``!!python/...``), merge keys,
deep nesting and documents of more than ``MAX_BYTES`` or ``MAX_NODES``. Plain scalars follow YAML 1.2's core
schema instead of PyYAML's YAML 1.1, where ``no`` is false, ``1:30`` is 90 and ``1e-6`` is text.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launcher.errors import SpecError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
#: Keys and values together; a shipped preset has fewer than 300.
MAX_NODES = 20_000

#: Keys and list indices from the document's root to a value.
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written: a line of a file, or a flag of the command line (``line`` is None)."""

    source: str
    line: int | None = None
    above: KeyPath = ()
    """Where the document's root stands in its file, for one that is a part of it: ``clusters.lab``."""

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"

    def at(self, path: KeyPath) -> str:
        """``file:line: path.to.field``, or ``--set path.to.field``."""
        path = (*self.above, *path)
        if not path:
            return str(self)
        return f"{self}{' ' if self.line is None else ': '}{dotted(path)}"


@dataclass(frozen=True, slots=True)
class YamlSource:
    """A parsed document and the place of each of its values, by path from the root (``()``)."""

    data: Any
    places: Mapping[KeyPath, Place]


def dotted(path: KeyPath) -> str:
    """``("cluster", "tolerations", 0, "key")`` as ``cluster.tolerations[0].key``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def shown_path(path: Path) -> str:
    """A file as errors name it: relative to the current folder where it lies inside."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def read_yaml(path: Path, *, source: str | None = None) -> YamlSource:
    """Parse a file.

    Args:
        path: the file.
        source: how errors name it; the path itself where None.

    Raises:
        SpecError: the file cannot be read, or as ``parse_yaml``.
    """
    source = str(path) if source is None else source
    try:
        raw = path.read_bytes()[: MAX_BYTES + 1]
    except OSError as error:
        raise SpecError(f"{source}: cannot be read", why=error.strerror) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise SpecError(f"{source}:{line}: not UTF-8 text") from error
    return parse_yaml(text, source=source)


def parse_yaml(text: str, *, source: str, flag: bool = False) -> YamlSource:
    """Parse one document.

    Args:
        text: the YAML.
        source: how errors name it.
        flag: the text stood on the command line, where lines mean nothing: errors name ``source`` alone.

    Raises:
        SpecError: with ``source:line`` and what is wrong there; never anything of PyYAML's.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise SpecError(f"{source}: larger than {MAX_BYTES >> 20} MiB")

    def place(mark: yaml.Mark) -> Place:
        return Place(source, None if flag else mark.line + 1)

    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        places: dict[KeyPath, Place] = {}
        if node is None:
            return YamlSource(None, {(): Place(source, None if flag else 1)})
        return YamlSource(_build(node, (), places, place), places)
    except _RefusedError as refused:
        raise SpecError(
            f"{place(refused.mark).at(refused.path)}: {refused.what}", next_step=refused.next_step
        ) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        where = Place(source, None if flag else line)
        raise SpecError(f"{where}: character U+{int(error.character):04X} is not allowed in YAML") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = place(mark) if mark else Place(source)
        column = f", column {mark.column + 1}" if mark and not flag else ""
        why = f"{error.context}{column}" if error.context else column.removeprefix(", ") or None
        raise SpecError(f"{where}: not valid YAML: {error.problem or error.context}", why=why) from None
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(data: Any) -> str:
    """Plain data as YAML in the form of the shipped presets; ``parse_yaml`` reads the same data back."""
    # Escapes instead of Unicode: some of its line separators would not survive being printed.
    return yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=110, default_flow_style=False
    )


class _RefusedError(Exception):
    """Valid YAML that this reader does not take."""

    def __init__(self, what: str, mark: yaml.Mark, path: KeyPath = (), next_step: str | None = None) -> None:
        super().__init__(what)
        self.what, self.mark, self.path, self.next_step = what, mark, path, next_step


class _Loader(yaml.SafeLoader):
    """Composes nodes (never objects), with YAML 1.2's core schema for plain scalars."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's name and type
    _depth = 0
    _num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _RefusedError(
                "anchors (&) and aliases (*) are not allowed", mark, next_step="write the value out"
            )
        if event.tag is not None:
            raise _RefusedError(f"the tag {event.tag!r} is not allowed", mark, next_step="remove the tag")
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise _RefusedError(f"more than {MAX_NODES} keys and values in one document", mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _RefusedError(f"nested deeper than {MAX_DEPTH} levels", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 (PyYAML's own rules) or the core schema would take for something else."""

    def represent_sequence(
        self, tag: str, sequence: Any, flow_style: bool | None = None
    ) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)


_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
              r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789"),
)  # fmt: skip
for _resolving in (_Loader, _Dumper):
    for _name, _pattern, _first in _CORE_SCHEMA:
        _resolving.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}",
            re.compile(rf"^(?:{_pattern})$"),
            [*_first, *([""] if _name == "null" else [])],
        )


def _build(node: yaml.Node, path: KeyPath, places: dict[KeyPath, Place], place: Any) -> Any:
    places[path] = place(node.start_mark)
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(key_node, path, place)
            if key in mapping:
                first = places[(*path, key)]
                raise _RefusedError(
                    "written twice" if first.line is None else f"written twice, first in line {first.line}",
                    key_node.start_mark, (*path, key),
                )  # fmt: skip
            mapping[key] = _build(value_node, (*path, key), places, place)
            places[(*path, key)] = place(key_node.start_mark)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, i), places, place) for i, item in enumerate(node.value)]
    return _scalar(node, path)


def _key(node: yaml.Node, path: KeyPath, place: Any) -> str:
    if isinstance(node, yaml.ScalarNode):
        if node.value == "<<" and node.style is None:
            raise _RefusedError("merge keys (<<) are not allowed", node.start_mark, path, "use `extends:`")
        value: Hashable = _scalar(node, path)
        if isinstance(value, str):
            return value
    raise _RefusedError("a key must be text", node.start_mark, path, "put the key in quotes")


def _scalar(node: yaml.Node, path: KeyPath) -> Any:
    text: str = node.value
    kind = node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        digits = text.lstrip("+-")
        if len(digits) > 30:
            raise _RefusedError("a number of more than 30 digits", node.start_mark, path)
        return int(text, 0) if digits[:2] in ("0o", "0x") else int(text)
    if kind == "float":
        return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))
    # JSON writes a character beyond U+FFFF as the escapes of two halves, and JSON is welcome here.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
