"""Influence of every response token, traced inside an RL update. Importing this package imports no torch.

The public names load on first use::

    from influence import InfluenceTracer, TracerConfig
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from influence.capture import CaptureError, MicroBatchCapture
    from influence.config import InfluenceWarning, TracerConfig, TracerConfigError
    from influence.groups import GatherError
    from influence.memory import MemoryEstimate, estimate_memory
    from influence.score import RowScores
    from influence.tracer import InfluenceTracer

__all__ = [
    "CaptureError",
    "GatherError",
    "InfluenceTracer",
    "InfluenceWarning",
    "MemoryEstimate",
    "MicroBatchCapture",
    "RowScores",
    "TracerConfig",
    "TracerConfigError",
    "estimate_memory",
]

_HOMES = {
    "CaptureError": "influence.capture",
    "GatherError": "influence.groups",
    "InfluenceTracer": "influence.tracer",
    "InfluenceWarning": "influence.config",
    "MemoryEstimate": "influence.memory",
    "MicroBatchCapture": "influence.capture",
    "RowScores": "influence.score",
    "TracerConfig": "influence.config",
    "TracerConfigError": "influence.config",
    "estimate_memory": "influence.memory",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
