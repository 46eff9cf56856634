"""Additions of two-digit numbers, solved column by column, with an answer that can be checked.

A correct response to ``37+48`` reads ``7+8=15 3+4+1=8 so 85``. A *careless* one slips by one in some column
and carries its mistake on, so that whether a response is accepted hangs on single tokens.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

DATA_SOURCE = "influence/two-digit-addition"
_ANSWER = re.compile(r"\bso (\d+)$")


@dataclass(frozen=True, slots=True)
class Addition:
    """``left + right``, both from 10 to 99."""

    left: int
    right: int

    @property
    def question(self) -> str:
        return f"What is {self.left}+{self.right}?"

    @property
    def answer(self) -> int:
        return self.left + self.right

    def response(self, rng: random.Random, slip_probability: float = 0.0) -> str:
        """Work the columns out, each column's sum off by one with ``slip_probability``."""
        left_tens, left_ones = divmod(self.left, 10)
        right_tens, right_ones = divmod(self.right, 10)
        ones = _slip(left_ones + right_ones, rng, slip_probability)
        carry = ones >= 10
        tens = _slip(left_tens + right_tens + carry, rng, slip_probability)
        total = 10 * tens + ones % 10
        carried = "+1" if carry else ""
        return f"{left_ones}+{right_ones}={ones} {left_tens}+{right_tens}{carried}={tens} so {total}"


def _slip(column_sum: int, rng: random.Random, probability: float) -> int:
    if rng.random() >= probability:
        return column_sum
    return column_sum + (rng.choice((-1, 1)) if column_sum > 0 else 1)


def random_additions(count: int, rng: random.Random) -> list[Addition]:
    """``count`` different additions, in random order.

    Raises:
        ValueError: there are only 8,100.
    """
    if not 0 < count <= 90 * 90:
        raise ValueError(f"there are 1 to {90 * 90} different additions, not {count}")
    return [Addition(10 + number // 90, 10 + number % 90) for number in rng.sample(range(90 * 90), count)]


def stated_answer(response: str) -> int | None:
    """The number that a response ends with, after ``so``; None where it states none."""
    match = _ANSWER.search(response.strip())
    return int(match.group(1)) if match else None
