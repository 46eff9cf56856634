"""The template engine: values arrive unchanged whatever they hold, and mistakes name template and line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher.errors import SpecError
from launcher.render import env_value, parse_manifest, render_template, tojson
from launcher.yaml_source import parse_yaml

HOSTILE = [
    "a: b",
    "- x\n- y",
    '"quoted"',
    "it's",
    "{{ run }} {% raw %}",
    "#} {# comment",
    "$(POD_UID) $$ ${HOME} `id`",
    "line\nbreak\r\n\ttab",
    "---\n...\n",
    "&anchor *alias !tag <<",
    "\u0085\u2028\u2029\ufeff\ufffe\uffff",
    "\x01\x1b[31m\x7f\x9f\xa0",
    "Größe 日本 \U0001f600\U0010ffff",
    "no",
    "null",
    "1e3",
    "0x1F",
    "'",
    "\\",
    "\\u0041",
    " leading and trailing ",
    "# no comment",
    "</script>",
]
ANY_TEXT = st.sampled_from(HOSTILE) | st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\0")
)
PLAIN_DATA = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | ANY_TEXT,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(ANY_TEXT, below, max_size=3),
    max_leaves=8,
)


class YamlReader:
    """Independent readers: PyYAML's own in Python, and libyaml's in C; both YAML 1.1."""

    python = yaml.SafeLoader
    c = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def same(a: Any, b: Any) -> bool:
    """Equal with types and the sign of zero."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return (
        type(a) is type(b)
        and a == b
        and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))
    )


@settings(max_examples=250, deadline=None)
@given(PLAIN_DATA)
@example(HOSTILE)
@example([1e16, 1e-7, 5e-324, 1.7976931348623157e308, -0.0, 10**18])
def test_every_yaml_reader_reads_back_the_value_that_tojson_wrote(value: Any) -> None:
    text = f"key: {tojson(value)}\nnext: 1\n"
    assert "\n" not in tojson(value)
    for reader in (YamlReader.python, YamlReader.c):
        assert same(yaml.load(text, Loader=reader), {"key": value, "next": 1})  # noqa: S506 - safe loaders
    assert same(parse_yaml(text, source="x").data, {"key": value, "next": 1})
    assert same(json.loads(tojson(value)), value)


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    (tmp_path / "kind").mkdir()
    return tmp_path


def rendered(templates: Path, text: str, **values: Any) -> Any:
    (templates / "kind" / "t.j2").write_text(text)
    return parse_manifest(render_template("kind/t.j2", values, folder=templates), "t")


def error_of(templates: Path, text: str, **values: Any) -> SpecError:
    with pytest.raises(SpecError) as caught:
        rendered(templates, text, **values)
    return caught.value


@pytest.mark.parametrize("value", HOSTILE)
def test_a_value_never_becomes_structure(templates: Path, value: str) -> None:
    text = (
        "a: {{ v | tojson }}\n"
        "b: [{{ v | tojson }}, {k: {{ v | tojson }}}]\n"
        "{% for x in [v] %}\nc: {{ x | tojson }}\n{% endfor %}\n"
    )
    assert rendered(templates, text, v=value) == {"a": value, "b": [value, {"k": value}], "c": value}


def test_a_missing_variable_names_template_line_and_variable(templates: Path) -> None:
    error = error_of(templates, "a: 1\nb: {{ imgae | tojson }}\n", image="x")
    assert error.what == "templates/kind/t.j2:2: 'imgae' is undefined"
    assert error.why == "did you mean image?"
    assert error.exit_code == 3
    error = error_of(
        templates, "a: 1\n\n\nb: {{ spec.cluster.imgae | tojson }}\n", spec={"cluster": {"image": "x"}}
    )
    assert error.what == "templates/kind/t.j2:4: 'imgae' is undefined"
    assert error.why == "did you mean image?"
    error = error_of(templates, "a: {{ q | tojson }}\n", image="x", run="y")
    assert error.why == "there are image, run"


@pytest.mark.parametrize(
    "use",
    [
        "{{ missing }}",
        "{{ missing | tojson }}",
        "{{ [1, missing] | tojson }}",
        "{{ {'a': {'b': missing}} | tojson }}",
        "{{ missing | env_value | tojson }}",
        "{{ missing.deeper | tojson }}",
        "{% if missing %}1{% endif %}",
        "{% if missing == 'x' %}1{% endif %}",
        "{% for x in missing %}1{% endfor %}",
    ],
)
def test_a_missing_variable_is_an_error_wherever_it_is_used(templates: Path, use: str) -> None:
    assert error_of(templates, f"a: 1\nb: {use}\n").what == "templates/kind/t.j2:2: 'missing' is undefined"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: 1\nb: {{ v }}\n", "templates/kind/t.j2:2: prints a value that did not go through `| tojson`"),
        ("a: '{{ v | tojson }}{{ v | upper }}'\n", "templates/kind/t.j2:1: prints a value"),
        ("a: {{ v | tojson | trim }}\n", "templates/kind/t.j2:1: prints a value"),
        ("a: {{ (v | tojson) ~ 'x' }}\n", "templates/kind/t.j2:1: prints a value"),
        ("a: {{ v.upper | tojson }}\n", "is no value for YAML"),
        ("a: {{ {1: 2} | tojson }}\n", "a key must be text"),
        ("a: 1\nb: {% if %}\n", "t.j2:2: not a valid template"),
        ("a: 1\nb: {{ v | nothing }}\n", "t.j2:2: not a valid template: No filter named 'nothing'"),
        ("a: 1\nb: {{ 1 + v }}\n", "templates/kind/t.j2:2: "),
        ("a: 1\n{% include 'other.j2' %}\n", "no template 'other.j2'"),
    ],
)
def test_mistakes_in_a_template_are_errors_of_the_template(templates: Path, text: str, what: str) -> None:
    assert what in error_of(templates, text, v="value").what


@pytest.mark.parametrize("value", ["a\0b", "a\ud800", float("nan"), float("inf"), {1}, b"x", object()])
def test_what_yaml_cannot_hold_is_refused(templates: Path, value: Any) -> None:
    assert error_of(templates, "a: {{ v | tojson }}\n", v=value).what.startswith("templates/kind/t.j2:1: ")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: {{ v | tojson }}\na: 2\n", "kind/t.j2 as rendered:2: a: written twice, first in line 1"),
        ("a: 1\n---\nb: 2\n", "kind/t.j2 as rendered:2: not valid YAML"),
        ("- a\n", "kind/t.j2 as rendered: must be one mapping"),
        ("", "kind/t.j2 as rendered: must be one mapping"),
        ("a: [\n", "kind/t.j2 as rendered:2: not valid YAML"),
    ],
)
def test_what_was_rendered_is_checked(templates: Path, text: str, what: str) -> None:
    assert error_of(templates, text, v=1).what.startswith(what)


def test_a_template_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no template 'none\.j2'"):
        render_template("none.j2", {}, folder=tmp_path)


def kubelet_expands(text: str, env: dict[str, str]) -> str:
    """A container's env and args as Kubernetes documents it: ``$$`` is a dollar, unknown ``$(NAME)`` stay."""
    result, i = "", 0
    while i < len(text):
        if text[i] == "$" and text[i + 1 : i + 2] == "$":
            result, i = result + "$", i + 2
        elif text[i] == "$" and text[i + 1 : i + 2] == "(" and ")" in text[i:]:
            end = text.index(")", i)
            name = text[i + 2 : end]
            result, i = result + env.get(name, text[i : end + 1]), end + 1
        else:
            result, i = result + text[i], i + 1
    return result


@settings(max_examples=200, deadline=None)
@given(st.text("$()ABx ", max_size=20))
def test_kubernetes_expands_nothing_in_an_escaped_text(text: str) -> None:
    assert kubelet_expands(env_value(text), {"A": "!", "B": "!", "AB": "!", "": "!"}) == text


def test_the_model_of_kubernetes_expansion_follows_its_documentation() -> None:
    env = {"A": "1"}
    assert kubelet_expands("$(A) $$(A) $(B) $A $$ $(", env) == "1 $(A) $(B) $A $ $("
