"""A clock of one module's own: `time` belongs to every thread of the process, servers of stubs included."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest


def give_own_time(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, **functions: Callable[..., object]
) -> None:
    """Let a module that has imported `time` see these functions in place of `time`'s own."""
    monkeypatch.setattr(module, "time", SimpleNamespace(**{**vars(time), **functions}))
