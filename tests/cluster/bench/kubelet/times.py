"""Time as Kubernetes writes it."""

from __future__ import annotations

import datetime
import time


def seconds() -> str:
    """``2026-02-21T10:00:00Z``: metav1.Time."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def microseconds() -> str:
    """metav1.MicroTime."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def nanoseconds() -> str:
    """Of a log line."""
    now_ns = time.time_ns()
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_ns // 10**9))
    return f"{whole}.{now_ns % 10**9:09d}Z"


def parse(text: str) -> float:
    """Seconds since the epoch, of any of these."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    moment = datetime.datetime.fromisoformat(whole).replace(tzinfo=datetime.UTC)
    return moment.timestamp() + float(f"0.{fraction or 0}")
