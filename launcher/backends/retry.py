"""Whether an attempt's end is followed by another attempt, when, and who pays for it.

The same rules as a Kubernetes Job with the project's ``podFailurePolicy``: what an exit code means
comes from ``influence.rundir.exits``; charged retries stop at ``backoff_limit``; the wait doubles up to
six minutes. Retries without charge are bounded by the deadline, by the growing wait, and by
:data:`MAX_IDLE_RETRIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from influence.rundir import Verdict, classify, describe

MAX_BACKOFF_S = 360.0
MAX_IDLE_RETRIES = 100
"""Retries in a row, charged or not, during which no step was committed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """The section ``retry`` of a spec."""

    backoff_limit: int
    """Charged retries before the run fails."""
    backoff_s: float
    """Wait before the first retry, seconds; doubles with each retry that follows no new step."""
    grace_period_s: float
    """From SIGTERM to SIGKILL, seconds."""
    deadline_s: float
    """Longest time under one supervisor, waits included, seconds."""

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> RetryPolicy:
        """Read it from a resolved spec, which the presets' schema has checked."""
        retry = spec["retry"]
        return cls(
            backoff_limit=int(retry["backoff_limit"]),
            backoff_s=float(retry["backoff_s"]),
            grace_period_s=float(retry["grace_period_s"]),
            deadline_s=float(retry["deadline_s"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEnd:
    """How an attempt ended."""

    exit_code: int
    """0 to 255, or the negative number of the signal that killed it."""
    complete: bool
    """Whether every step of the run is committed now."""
    progressed: bool
    """Whether this attempt committed a step that was not there before."""
    detail: str = ""
    """What the trainer itself said about its end, if it did."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What the attempts so far have used up."""

    num_charged: int = 0
    num_idle: int = 0
    """Retries in a row since the last new step."""


class Action(StrEnum):
    SUCCEED = "succeed"
    FAIL = "fail"
    RETRY = "retry"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What follows an attempt's end; ``reason`` says why in words."""

    action: Action
    reason: str
    budget: Budget
    charged: bool = False
    wait_s: float = 0.0


def decide(end: AttemptEnd, budget: Budget, policy: RetryPolicy) -> Decision:
    """Apply the table to one attempt's end.

    A complete run has succeeded whatever the exit code was: a retry would only find nothing left to
    do. A trainer that exits 0 with steps missing is charged like a crash.
    """
    ended = describe(end.exit_code)
    if end.detail and end.detail not in ended:
        ended += f": {end.detail}"
    verdict = classify(end.exit_code)
    if end.complete:
        reason = (
            "all steps committed"
            if verdict is Verdict.DONE
            else f"all steps committed; the last attempt: {ended}"
        )
        return Decision(action=Action.SUCCEED, reason=reason, budget=budget)
    if verdict is Verdict.DONE:
        ended = "the trainer exited 0 before all steps were committed"
    if verdict is Verdict.FATAL:
        return Decision(action=Action.FAIL, reason=f"{ended}; the same would happen again", budget=budget)
    charged = verdict is not Verdict.FREE_RETRY
    if charged and budget.num_charged >= policy.backoff_limit:
        limit = f"no retry left of {policy.backoff_limit}" if policy.backoff_limit else "retries are off"
        return Decision(action=Action.FAIL, reason=f"{ended}; {limit}", budget=budget, charged=True)
    num_idle = 1 if end.progressed else budget.num_idle + 1
    if num_idle > MAX_IDLE_RETRIES:
        return Decision(
            action=Action.FAIL,
            reason=f"{ended}; {MAX_IDLE_RETRIES} retries in a row brought no step",
            budget=budget,
        )
    after = Budget(budget.num_charged + charged, num_idle)
    count = f"retry {after.num_charged} of {policy.backoff_limit}" if charged else "retry without charge"
    return Decision(
        action=Action.RETRY, reason=f"{ended}; {count}", budget=after, charged=charged,
        wait_s=backoff_s(num_idle, policy),
    )  # fmt: skip


def backoff_s(num_idle: int, policy: RetryPolicy) -> float:
    """Seconds to wait before the ``num_idle``-th retry (from 1) in a row that follows no new step."""
    doublings = min(num_idle - 1, 30)  # far beyond the cap, and no overflow
    return min(policy.backoff_s * 2.0**doublings, MAX_BACKOFF_S)
