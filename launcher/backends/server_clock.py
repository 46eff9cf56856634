"""The time that a server has: its objects' times are compared with that one, not with this machine's."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime


class ServerClock:
    """A server's clock, as its answers' headers tell it; this machine's own until one did."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def read(self, date: str | None) -> None:
        """Take over the time of an answer that has just come.

        Args:
            date: its header ``Date``; one that is missing, or cannot be read, tells nothing.
        """
        try:
            moment_s = parsedate_to_datetime(date).timestamp() if date else None
        except ValueError:
            return
        if moment_s is not None:
            self._ahead_s = moment_s - time.time()

    def now_s(self) -> float:
        """Unix time in seconds, true to a second."""
        return time.time() + self._ahead_s
