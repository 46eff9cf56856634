"""Why a cluster has no running pod for a run: whether waiting cures it, and what a person can do.

The scheduler's words about a pod that it cannot place, and a controller's about one that the API server does
not let it create. Both come as sentences only, so they are told apart by what these programs have said for
many releases; a sentence that is not known is passed on, with the advice that is right for any.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from launcher.states import Phase

_NO_CLAIM = re.compile(r'persistentvolumeclaim "([^"]+)" (not found|is being deleted)')
_UNBOUND_CLAIM = "unbound immediate PersistentVolumeClaims"
_NO_ACCOUNT = re.compile(
    r'error looking up service account \S+?/([^\s:]+):|serviceaccount "([^"]+)" not found'
)
_NO_PRIORITY = re.compile(r"no PriorityClass with name (\S+) was found")
_QUOTA = "exceeded quota"
_CORRECTED = "and submit it under another name"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a run's object is doing, and why."""

    phase: Phase
    reason: str
    next_step: str | None = None


def not_scheduled(words: str, *, pod: str = "its pod", note: str = "") -> Finding:
    """No node takes a pod.

    Args:
        words: the scheduler's.
        pod: which, for a person.
        note: more about it, for the end of the reason.
    """
    reason = f"no node takes {pod}: {words}{note}"
    claim = _NO_CLAIM.search(words)
    if claim is not None:
        return Finding(
            Phase.STUCK,
            reason,
            f"create the claim '{claim[1]}' in the run's namespace, and it goes on by itself; or cancel it, "
            f"correct cluster.claim or cluster.data_claim, {_CORRECTED}",
        )
    if _UNBOUND_CLAIM in words:
        return Finding(
            Phase.QUEUED,
            reason,
            "it starts when its claim is bound; `kubectl describe persistentvolumeclaim` says why it is not",
        )
    return Finding(
        Phase.QUEUED,
        reason,
        "it starts when a node has room; if none ever will, compare hardware and cluster.node_selector with "
        "the nodes",
    )


def not_created(words: str) -> Finding:
    """A controller may not create a pod.

    Args:
        words: the API server's, as the controller's event repeats them.
    """
    reason = f"no pod can be created: {words}"
    if _QUOTA in words:
        return Finding(
            Phase.QUEUED,
            reason,
            "ask the namespace's administrator for a larger quota, or wait until other work ends",
        )
    missing = _missing_object(words)
    if missing is not None:
        what, setting = missing
        return Finding(
            Phase.STUCK,
            reason,
            f"create the {what}, and it goes on by itself; or cancel it, correct {setting}, {_CORRECTED}",
        )
    if "violates PodSecurity" in words:
        return Finding(
            Phase.STUCK,
            reason,
            "the namespace's Pod Security Standard forbids what the run's settings ask for (such as "
            "cluster.extended_resources); ask its administrator, or use another namespace",
        )
    return Finding(
        Phase.QUEUED,
        reason,
        "the controller tries again by itself; where these words stay, ask the namespace's administrator",
    )


def _missing_object(words: str) -> tuple[str, str] | None:
    """An object that pods refer to and that is not there, and the setting that names it."""
    account, priority = _NO_ACCOUNT.search(words), _NO_PRIORITY.search(words)
    if account is not None:
        return f"service account '{account[1] or account[2]}'", "cluster.service_account"
    if priority is not None:
        return f"priority class '{priority[1]}'", "cluster.priority_class"
    return None
