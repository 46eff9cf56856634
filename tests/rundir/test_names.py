from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from influence.rundir import (
    MAX_RUN_NAME,
    RunNameError,
    RunPaths,
    run_name,
    validate_new_run_name,
    validate_run_name,
)

# What Kubernetes takes for the name of a Service (RFC 1035), written independently of the code.
LABEL = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")


@pytest.mark.parametrize("name", ["a", "infl-alltoken-timing-0221", "x" * MAX_RUN_NAME, "a--b"])
def test_labels_are_names(name: str) -> None:
    assert validate_run_name(name) == name


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "empty"),
        ("x" * 35, "35 characters"),
        ("../etc", "'.' '/'"),
        ("a/b", "'/'"),
        ("..", "'.'"),
        ("Infl", "'I'"),
        ("infl_run", "'_'"),
        ("run\n", r"'\n'"),
        ("\x1b[31mrun", r"'\x1b'"),
        ("naïve", r"'\xef'"),
        ("٣run", r"'\u0663'"),
        ("0221-run", "start with a letter"),
        ("-run", "start with a letter"),
        ("run-", "ends with a hyphen"),
    ],
)
def test_anything_else_is_refused_with_its_problem(name: str, problem: str) -> None:
    with pytest.raises(RunNameError) as error:
        validate_run_name(name)
    assert problem in error.value.reason
    assert str(error.value).isascii() and str(error.value).isprintable()


@given(st.text(max_size=80))
def test_a_name_is_valid_exactly_if_it_is_a_label_and_the_suggestion_always_is(name: str) -> None:
    try:
        assert validate_run_name(name) == name
    except RunNameError as error:
        assert not (LABEL.match(name) and len(name) <= 34 and not name.endswith("\n"))
        suggestion = error.next_step.split("'")[1]
        assert validate_run_name(suggestion) == suggestion
    else:
        assert LABEL.match(name) and len(name) <= 34


def test_names_of_the_shipped_presets() -> None:
    assert run_name("alltoken-timing", [], "0221") == "infl-alltoken-timing-0221"
    assert run_name("alltoken-timing", ["tiny-cpu"], "0221") == "infl-alltoken-timing-tiny-cpu-0221"
    assert run_name("My_Preset.v2", ["lora"], "ab12") == "infl-my-preset-v2-lora-ab12"


def test_a_long_name_keeps_prefix_and_suffix_and_stays_apart_from_its_like() -> None:
    one = run_name("capped512-timing", ["tiny-cpu"], "0221")
    other = run_name("capped512-timing", ["tiny-cpu-2"], "0221")
    assert one.startswith("infl-capped512-timing-") and one.endswith("-0221")
    assert len(one) <= MAX_RUN_NAME and one != other
    assert one == run_name("capped512-timing", ["tiny-cpu"], "0221")


@given(
    st.text(min_size=1, max_size=60),
    st.lists(st.text(min_size=1, max_size=30), max_size=3),
    # An end such as -r2 is what a cluster gives to a run's next start.
    st.from_regex(r"[a-z0-9]([a-z0-9-]{0,6}[a-z0-9])?", fullmatch=True).filter(
        lambda suffix: not re.fullmatch(r"(.*-)?r[0-9]+", suffix)
    ),
)
def test_every_preset_gives_a_valid_name(preset: str, overlays: list[str], suffix: str) -> None:
    name = run_name(preset, overlays, suffix)
    assert validate_run_name(name) == name and name.endswith(suffix)


def test_a_suffix_that_makes_no_name_is_an_error() -> None:
    for suffix in ("../x", "UPPER", "x" * 30, ""):
        with pytest.raises(RunNameError):
            run_name("smoke", [], suffix)


@pytest.mark.parametrize("name", ["infl-a-r2", "infl-a-r10", "a-r2-r3"])
def test_a_new_run_has_no_name_that_a_cluster_gives_to_the_next_start_of_another(name: str) -> None:
    with pytest.raises(RunNameError, match="cannot be the name of a new run") as caught:
        validate_new_run_name(name)
    assert "-v" in str(caught.value.next_step)
    with pytest.raises(RunNameError):
        run_name("smoke", (), name.rpartition("-")[2])
    assert RunPaths.of("/runs", name).name == name, "those that are there can be read"


@pytest.mark.parametrize("name", ["infl-a-r1", "infl-a-r0", "infl-a-r02", "infl-a-r2x", "r2", "infl-ar2"])
def test_names_that_only_look_alike_are_free(name: str) -> None:
    assert validate_new_run_name(name) == name
