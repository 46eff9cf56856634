"""Waiting for something to become true."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def until(
    question: Callable[[], Found | None], what: str, *, timeout_s: float = 60.0, every_s: float = 0.05
) -> Found:
    """The first answer of ``question`` that is true.

    Raises:
        TimeoutError: there was none in time; says what was waited for and the last answer.
    """
    end = time.monotonic() + timeout_s
    while True:
        answer = question()
        if answer:
            return answer
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not in {timeout_s:g} s; the last answer was {answer!r}")
        time.sleep(every_s)
