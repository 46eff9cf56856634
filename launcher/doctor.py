"""What a check of a place, of a profile or of an image says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    outcome: Literal["ok", "failed", "warning", "unknown"]
    detail: str
    next_step: str | None = None
