from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influence.tiny.arithmetic import Addition, random_additions, stated_answer
from influence.tiny.cache import cached_directory
from influence.tiny.reward import compute_score

two_digits = st.integers(10, 99)


@given(two_digits, two_digits)
@settings(max_examples=50)
def test_a_careful_response_is_right_and_rewarded(left: int, right: int) -> None:
    addition = Addition(left, right)
    response = addition.response(random.Random(0))
    assert stated_answer(response) == left + right
    assert compute_score("any", response, str(left + right)) == 1.0


@given(two_digits, two_digits, st.integers(0, 2**32))
@settings(max_examples=50)
def test_a_careless_response_slips_in_both_columns_and_says_what_it_computed(
    left: int, right: int, seed: int
) -> None:
    response = Addition(left, right).response(random.Random(seed), slip_probability=1.0)
    ones, tens = (int(part.split("=")[1].split()[0]) for part in response.split(" so ")[0].split())
    assert abs(ones - (left % 10 + right % 10)) == 1
    assert abs(tens - (left // 10 + right // 10 + (ones >= 10))) == 1
    assert stated_answer(response) == 10 * tens + ones % 10


def test_the_worked_example_of_the_documentation() -> None:
    assert Addition(37, 48).response(random.Random(0)) == "7+8=15 3+4+1=8 so 85"


@pytest.mark.parametrize("response", ["", "so", "7+8=15 so 85 and more", "so 85.", "also 85x"])
def test_a_response_without_a_final_answer_earns_nothing(response: str) -> None:
    assert stated_answer(response) is None
    assert compute_score("any", response, "85") == 0.0


def test_additions_are_distinct_and_the_same_for_a_seed() -> None:
    first = random_additions(500, random.Random(3))
    assert len(set(first)) == 500
    assert first == random_additions(500, random.Random(3))
    assert first != random_additions(500, random.Random(4))
    with pytest.raises(ValueError, match="8100"):
        random_additions(8101, random.Random(0))


def test_the_cache_builds_once_a_setting_and_keeps_nothing_of_a_failure(tmp_path: Path) -> None:
    builds: list[Path] = []

    def build(directory: Path) -> None:
        builds.append(directory)
        (directory / "data").write_text("whole")

    first = cached_directory("kind", {"a": 1}, build, tmp_path)
    assert cached_directory("kind", {"a": 1}, build, tmp_path) == first
    assert (first / "data").read_text() == "whole"
    assert cached_directory("kind", {"a": 2}, build, tmp_path) != first
    assert len(builds) == 2

    def fail(directory: Path) -> None:
        (directory / "data").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        cached_directory("kind", {"a": 3}, fail, tmp_path)
    assert len(list((tmp_path / "kind").iterdir())) == 2


def test_of_two_builders_at_once_the_first_wins(tmp_path: Path) -> None:
    def build_late(directory: Path) -> None:
        cached_directory("kind", {}, lambda other: (other / "data").write_text("first"), tmp_path)
        (directory / "data").write_text("second")

    made = cached_directory("kind", {}, build_late, tmp_path)
    assert (made / "data").read_text() == "first"
    assert list((tmp_path / "kind").iterdir()) == [made]
