"""The YAML reader: places, what it refuses, and that it reads what it writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import SpecError
from launcher.yaml_source import MAX_DEPTH, Place, dotted, dump_yaml, parse_yaml, read_yaml


def problem(text: str, *, flag: bool = False) -> str:
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, source="jobs/x.yaml", flag=flag)
    return caught.value.what


def test_every_value_knows_its_line() -> None:
    text = "# a comment\ntraining:\n  seed: 1\n  steps:\n    - 2\n    - {a: 3}\n"
    source = parse_yaml(text, source="x.yaml")
    assert source.data == {"training": {"seed": 1, "steps": [2, {"a": 3}]}}
    lines = {dotted(path): place.line for path, place in source.places.items() if path}
    assert lines == {
        "training": 2,
        "training.seed": 3,
        "training.steps": 4,
        "training.steps[0]": 5,
        "training.steps[1]": 6,
        "training.steps[1].a": 6,
    }


def test_a_place_is_a_line_of_a_file_or_a_flag() -> None:
    assert Place("jobs/x.yaml", 12).at(("a", "b", 0)) == "jobs/x.yaml:12: a.b[0]"
    assert Place("--set").at(("a", "b")) == "--set a.b"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),  # YAML 1.1: text
        ("1.0e-6", 1e-6),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("010", 10),  # YAML 1.1: 8
        ("0x1F", 31),
        ("0o17", 15),
        ("1:30", "1:30"),  # YAML 1.1: 90
        ("no", "no"),  # YAML 1.1: false
        ("on", "on"),
        ("2026-02-21", "2026-02-21"),  # YAML 1.1: a date
        ("1_000", "1_000"),
        ("TRUE", True),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("=", "="),
    ],
)
def test_plain_scalars_follow_the_core_schema(text: str, value: Any) -> None:
    data = parse_yaml(f"key: {text}", source="x").data["key"]
    assert data == value
    assert type(data) is type(value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: &x 2\n", "jobs/x.yaml:2: anchors (&) and aliases (*) are not allowed"),
        ("a: 1\nb: *x\n", "jobs/x.yaml:2: anchors (&) and aliases (*) are not allowed"),
        ("a: !!python/object/apply:os.system [id]\n", "jobs/x.yaml:1: the tag"),
        ("a: !mine 1\n", "jobs/x.yaml:1: the tag '!mine' is not allowed"),
        ("<<: {a: 1}\n", "jobs/x.yaml:1: merge keys (<<) are not allowed"),
        ("s:\n  a: 1\n\n  a: 2\n", "jobs/x.yaml:4: s.a: written twice, first in line 2"),
        ("a: 1\n---\nb: 2\n", "jobs/x.yaml:2: not valid YAML"),
        ("a: [1\nb: 2\n", "jobs/x.yaml:2: not valid YAML"),
        ("a:\n  - 1\n - 2\n", "jobs/x.yaml:3: not valid YAML"),
        ("a: b\n\tc: 1\n", "jobs/x.yaml:2: not valid YAML"),
        ("1: a\n", "jobs/x.yaml:1: a key must be text"),
        ("x:\n  ? [1]\n  : 2\n", "jobs/x.yaml:2: x: a key must be text"),
        ("a: 1\nb: \x00\n", "jobs/x.yaml:2: character U+0000 is not allowed"),
        ("a: " + "[" * 500, f"jobs/x.yaml:1: nested deeper than {MAX_DEPTH} levels"),
        ("a: " + "7" * 5000, "jobs/x.yaml:1: a: a number of more than 30 digits"),
    ],
)
def test_what_is_refused_says_where(text: str, expected: str) -> None:
    assert problem(text).startswith(expected)


def test_a_syntax_error_names_the_column() -> None:
    with pytest.raises(SpecError) as caught:
        parse_yaml("a: {b: 1]\n", source="x.yaml")
    assert "x.yaml:1: not valid YAML" in caught.value.what
    assert "column 9" in str(caught.value.why)


def test_aliases_that_would_expand_to_gigabytes_are_refused_at_the_first() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
    )
    assert problem(bomb).startswith("jobs/x.yaml:1: anchors")


def test_on_the_command_line_the_flag_is_the_place() -> None:
    assert problem("[1", flag=True).startswith("jobs/x.yaml: not valid YAML")
    assert problem("{a: 1, a: 2}", flag=True) == "jobs/x.yaml a: written twice"


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="cannot be read"):
        read_yaml(tmp_path)
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(SpecError, match=r"latin\.yaml:2: not UTF-8 text"):
        read_yaml(latin)
    huge = tmp_path / "huge.yaml"
    huge.write_bytes(b"#" * (1 << 21))
    with pytest.raises(SpecError, match="larger than 1 MiB"):
        read_yaml(huge)
    marked = tmp_path / "bom.yaml"
    marked.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(marked).data == {"a": 1}


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from(
    [
        "no",
        "1e-6",
        "0o7",
        "1:30",
        "null",
        "~",
        "<<",
        "=",
        "0x1f",
        "2026-02-21",
        " a",
        "a ",
        "# a",
        "- a",
        "a: b",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | TEXTS
PLAIN_DATA = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(TEXTS, below, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(TEXTS, PLAIN_DATA, max_size=4))
def test_what_is_written_reads_back_as_the_same_data(data: dict[str, Any]) -> None:
    text = dump_yaml(data)
    assert text.isascii()
    assert parse_yaml(text, source="x").data == data


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text("{}[]:,-&*!|>'\"%@`#? \n\tab1", max_size=40))
def test_any_text_is_read_or_refused_with_a_place(text: str) -> None:
    try:
        parse_yaml(text, source="x.yaml")
    except SpecError as error:
        assert error.what.startswith("x.yaml:")
