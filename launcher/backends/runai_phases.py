"""What each of Run:ai's phases means for a run.

``Degraded`` is not an end: such a training may return to Running, complete or fail. A word that is not in the
table is passed on as it is, and the state is UNKNOWN. Whether a preempted training is Pending or Resuming was
not seen; both wait.
"""

from __future__ import annotations

from collections.abc import Mapping

from launcher.states import Phase

STOPPED = "Stopped"
PHASES: Mapping[str, Phase] = {
    "Creating": Phase.QUEUED,
    "Pending": Phase.QUEUED,
    "Initializing": Phase.QUEUED,
    "Updating": Phase.QUEUED,
    "Resuming": Phase.BACKING_OFF,
    "Running": Phase.EXECUTING,
    "Degraded": Phase.EXECUTING,
    "Stopping": Phase.SUSPENDED,
    STOPPED: Phase.SUSPENDED,
    "Deleting": Phase.STOPPING,
    "Terminating": Phase.STOPPING,
    "Completed": Phase.COMPLETED,
    "Failed": Phase.FAILED,
}
ENDED = frozenset({Phase.COMPLETED, Phase.FAILED, Phase.CANCELLED})

_WORDS = {
    "Creating": "being created",
    "Pending": "waits for machines",
    "Initializing": "starts its pod",
    "Updating": "being updated",
    "Resuming": "goes on after it was stopped",
    "Running": "runs",
    "Degraded": "runs, degraded: some of its pods do not",
    "Stopping": "being suspended",
    STOPPED: "suspended",
    "Deleting": "being deleted",
    "Terminating": "its pod ends",
    "Completed": "completed",
    "Failed": "failed: its retries are used up",
}
_HELP = {
    "NonPreemptibleOverQuota": "submit it preemptible (--set cluster.preemptible=true), or ask for quota",
    "OverLimit": "ask the project's administrator for a higher limit, or choose smaller settings",
}


def phase_of(word: str) -> Phase:
    """The phase; UNREACHABLE, which means that the state is unknown, for a word that is not known."""
    return PHASES.get(word, Phase.UNREACHABLE)


def reason_of(word: str, message: str) -> str:
    """The phase in words for a person, with what Run:ai says about it."""
    known = _WORDS.get(word)
    if known is None:
        known = (
            f"Run:ai says '{word}', a phase that this launcher does not know" if word else "no phase is told"
        )
    return f"{known}: {message}" if message else known


def help_for(phase_reason: str) -> str | None:
    """What a person can do about the one word that Run:ai gives as a reason; None: nothing."""
    return _HELP.get(phase_reason)
