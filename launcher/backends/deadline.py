"""An end for what has none of its own: an answer that drips, a credential plugin that waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


class DeadlineError(Exception):
    """It had not ended in time."""


def within(most_s: float, work: Callable[[], _T]) -> _T:
    """What ``work`` returns or raises, if it does so in time.

    Time-outs of sockets begin anew with every byte, so they bound no answer. What did not end is left behind
    in its thread, which does not keep the process alive.

    Raises:
        DeadlineError: it took longer than ``most_s`` seconds.
    """
    returned: list[_T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(most_s)
    if raised:
        raise raised.pop()
    if not returned:
        raise DeadlineError
    return returned.pop()
