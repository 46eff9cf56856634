"""What can be wrong with an object store; like every error of a run: place, reason, next step.

::

    RunDirError
     +-- StoreError             what the store keeps is not what was sent
          +-- StoreConfigError  it cannot work as it is set up: credentials, bucket, rights, conditional puts
          +-- StoreOutageError  it has not answered for longer than we wait
          +-- StoreFullError    no room, or a quota is used up
"""

from __future__ import annotations

from influence.rundir import RunDirError


class StoreError(RunDirError):
    """An error of the store itself.

    Args:
        place: the object or folder, as a URL without credentials.
        reason: what is wrong, in words; never a server's own text, which may quote keys.
        next_step: what a person can do now.
    """

    def __init__(self, place: str, reason: str, next_step: str) -> None:
        super().__init__(None, f"{place}: {reason}", next_step)


class StoreConfigError(StoreError):
    """To start again changes nothing until a person has changed the settings."""


class StoreOutageError(StoreError):
    """No answer, or none but errors of the server.

    Args:
        was_reached: whether it has answered this process before: if so, the settings are right.
    """

    def __init__(self, place: str, reason: str, next_step: str, *, was_reached: bool) -> None:
        super().__init__(place, reason, next_step)
        self.was_reached = was_reached


class StoreFullError(StoreError):
    """The store takes nothing more."""
