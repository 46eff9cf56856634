"""Something happens right before one of the system calls that change files: a SIGKILL, or another writer."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CHANGING = ("open", "write", "fsync", "close", "link", "rename", "replace", "unlink", "mkdir")
MEETING = ("open", "link", "rename", "replace", "unlink", "listdir")
"""Where two writers can meet: what sets or reads a name."""


@contextmanager
def before_operation(number: int, action: Callable[[], None]) -> Iterator[list[str]]:
    """Run an action once, before the changing operation with this number (from 0).

    Yields the names of the operations so far, the action's own left out.
    """
    done: list[str] = []
    busy = False

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal busy
            if not busy:
                if len(done) == number:
                    busy = True
                    action()
                    busy = False
                done.append(name)
            return real(*args, **kwargs)

        return call

    real = {name: getattr(os, name) for name in CHANGING}
    for name, function in real.items():
        setattr(os, name, watched(name, function))
    try:
        yield done
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def killed_before(number: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that is killed before its n-th operation; False if it finished first."""
    child = os.fork()
    if child == 0:
        try:
            with before_operation(number, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


class Turns:
    """Two threads by turns: the first to its i-th operation, the second to its j-th, then each to its end.

    Only operations of these two threads count, and not those of ``before_second``.
    """

    def __init__(
        self,
        first: Callable[[], object],
        before_second: Callable[[], object],
        second: Callable[[], object],
        i: int,
        j: int,
    ) -> None:
        self._work = {"first": first, "second": second}
        self._before_second = before_second
        self._switch = {"first": i, "second": j}
        self._open = os.open
        self._condition = threading.Condition()
        self._on = "first"
        self.num_operations = {"first": 0, "second": 0}
        self.results: dict[str, object] = {}

    def run(self) -> dict[str, object]:
        """What each piece of work returned, or the exception that it raised."""
        real = {name: getattr(os, name) for name in MEETING}
        threads = [threading.Thread(target=self._thread, name=name, daemon=True) for name in self._work]
        for name, function in real.items():
            setattr(os, name, self._watched(function))
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=60)
        finally:
            for name, function in real.items():
                setattr(os, name, function)
        return self.results

    def _thread(self) -> None:
        me = threading.current_thread().name
        self._wait(me)
        if me == "second":
            threading.current_thread().name = "before second"
            self._before_second()
            threading.current_thread().name = me
        try:
            self.results[me] = self._work[me]()
        except Exception as error:
            self.results[me] = error
        self._hand_over(me)

    def _watched(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            me = threading.current_thread().name
            looks_at_a_directory = real is self._open and args[1] & os.O_DIRECTORY
            if me in self._work and not looks_at_a_directory:
                if self.num_operations[me] == self._switch[me]:
                    self._hand_over(me)
                    self._wait(me)
                self.num_operations[me] += 1
            return real(*args, **kwargs)

        return call

    def _other(self, me: str) -> str:
        return "second" if me == "first" else "first"

    def _hand_over(self, me: str) -> None:
        with self._condition:
            if self._other(me) not in self.results:
                self._on = self._other(me)
                self._condition.notify_all()

    def _wait(self, me: str) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._on == me)
