"""What state a run is in, and why: one state machine for every backend.

:func:`derive` is a pure function of two observations:

* :class:`BackendFacts`, what the place where the run executes says (a supervisor, a Job, ...);
* :class:`RunFacts`, what the trainer committed to the run directory, where that can be read.

The run directory is the truth about results: a run whose steps are all committed has succeeded,
whatever became of the process that drove it, and a backend that reports success without them has not.
A question that could not be asked (a failed poll, a foreign directory) is UNKNOWN, never FAILED.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from launcher.errors import ExitCode
from launcher.places import is_command, suggest

if TYPE_CHECKING:
    from influence.rundir import RunSpec


class State(StrEnum):
    """The states of a run, as every command prints them."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    RETRYING = "RETRYING"
    SUSPENDED = "SUSPENDED"
    STALLED = "STALLED"  # goes on only when a person acts, though nothing has failed
    TERMINATING = "TERMINATING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    UNKNOWN = "UNKNOWN"

    @property
    def terminal(self) -> bool:
        """Whether the run has ended; only a new submit changes such a state."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


class Phase(StrEnum):
    """What a backend says about a run, in words that every backend can map its own to."""

    NEVER_STARTED = "never started"  # the run exists, nothing has been asked to execute it
    QUEUED = "queued"  # accepted; waits for a process, a machine or a quota
    EXECUTING = "executing"  # an attempt runs
    BACKING_OFF = "backing off"  # between two attempts
    SUSPENDED = "suspended"
    STUCK = "stuck"  # neither runs nor ends by itself
    STOPPING = "stopping"  # told to stop, not gone yet
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"  # what drove the run is gone and left no word about an end
    ABSENT = "absent"  # the backend answered, and knows no such run
    UNREACHABLE = "unreachable"  # the backend did not answer


# What an unfinished backend phase means for the run; the other phases ask the run directory
# first, and so does SUSPENDED, where nothing is left that runs.
_LIVE = {
    Phase.QUEUED: State.PENDING,
    Phase.EXECUTING: State.RUNNING,
    Phase.BACKING_OFF: State.RETRYING,
    Phase.SUSPENDED: State.SUSPENDED,
    Phase.STUCK: State.STALLED,
    Phase.STOPPING: State.TERMINATING,
}
_ENDED = {
    Phase.NEVER_STARTED: State.PENDING,
    Phase.CANCELLED: State.CANCELLED,
    Phase.FAILED: State.FAILED,
    Phase.LOST: State.FAILED,
    Phase.ABSENT: State.FAILED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendFacts:
    """One backend's answer about one run."""

    backend: str
    phase: Phase
    reason: str
    """In words, for a person; says what ended an attempt, what is waited for, ..."""
    num_charged: int | None = None
    """Retries charged to the limit so far; None when the backend does not say."""
    started_at: str | None = None
    """ISO 8601, UTC: when the backend took the run."""
    num_attempts: int | None = None
    """Attempts started so far as the backend counts them; the run directory's count goes before it."""
    document: RunSpec | None = None
    """The run as the backend holds it (a Job's environment); None where only the run directory does."""
    next_step: str | None = None
    """What a person can do, where this phase needs one: a command, or whom to ask for what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a run directory says, or why it cannot be read."""

    run: str
    run_dir: str | None
    """The directory as this machine sees it; None where it does not."""
    storage: str | None = None
    """Where a directory lies that this machine does not see, in words."""
    unreadable: str | None = None
    """The reason why the directory cannot be read; nothing below is known then."""
    preset: str | None = None
    overlays: tuple[str, ...] = ()
    spec_hash: str | None = None
    total_steps: int | None = None
    num_committed: int = 0
    missing_steps: tuple[int, ...] = ()
    damaged: tuple[str, ...] = ()
    """Commit records that cannot be used, in words; their steps count as missing."""
    attempt: int | None = None
    """The highest attempt claimed."""
    last_step_at_s: float | None = None
    """Unix time of the last commit, seconds."""
    backoff_limit: int | None = None
    wandb_url: str | None = None
    wandb_mode: str | None = None
    submit_command: str | None = None
    """The command that submits the same spec again."""
    out_of_reach: str | None = None
    """Why a run directory that should be readable here is not, in words; the backend's word counts then."""
    options: tuple[str, ...] = ()
    """The options by which a command finds the run again, for the commands that are suggested."""

    @property
    def complete(self) -> bool:
        """Whether every step that the spec asks for is committed."""
        return self.unreadable is None and self.total_steps is not None and not self.missing_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run's state with everything that ``status`` shows; :meth:`to_dict` is its JSON form."""

    run: str
    backend: str
    state: State
    reason: str
    next_command: str | None
    """The command that a person can give now, as it is printed; None where none helps."""
    settled: bool
    """Whether only a person can change the state: the run has ended, or its directory is unreadable."""
    run_dir: str | None
    """The run directory as this machine sees it; None where it does not."""
    storage: str | None = None
    """Where the run directory lies that this machine does not see, in words."""
    next_step: str | None = None
    """What a person can do now, in words, where it is no command."""
    preset: str | None = None
    overlays: tuple[str, ...] = ()
    spec_hash: str | None = None
    steps_committed: int | None = None
    total_steps: int | None = None
    attempt: int | None = None
    charged_retries: int | None = None
    backoff_limit: int | None = None
    last_step_age_s: float | None = None
    started_at: str | None = None
    wandb_url: str | None = None
    wandb_mode: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The status as ``--output json`` prints it."""
        document = {field.name: getattr(self, field.name) for field in fields(self)}
        return document | {"state": self.state.value, "overlays": list(self.overlays)}

    @property
    def advice(self) -> str | None:
        """What a person can do now: a command, or words."""
        return self.next_step or self.next_command

    @property
    def exit_code(self) -> ExitCode:
        """What ``status --wait`` and ``submit --follow`` exit with in this state."""
        return {
            State.SUCCEEDED: ExitCode.OK,
            State.FAILED: ExitCode.RUN_FAILED,
            State.CANCELLED: ExitCode.RUN_CANCELLED,
        }.get(self.state, ExitCode.RUN_UNFINISHED)


def derive(backend: BackendFacts, run: RunFacts, *, now_s: float) -> RunStatus:
    """The state of a run.

    Args:
        backend: the backend's answer; ``Phase.UNREACHABLE`` when it gave none.
        run: the run directory's content. ``total_steps`` is None when the directory cannot be
            reached from here (a claim that only a cluster mounts): the backend's word counts then.
        now_s: Unix time in seconds, for the age of the last step.
    """
    state, reason = _state(backend, run)
    advice = _advice(state, backend, run)
    command = advice is not None and is_command(advice)
    readable = run.unreadable is None
    age_s = None if run.last_step_at_s is None else max(0.0, now_s - run.last_step_at_s)
    return RunStatus(
        run=run.run,
        backend=backend.backend,
        state=state,
        reason=reason,
        next_command=advice if command else None,
        settled=state.terminal or not readable,
        run_dir=run.run_dir,
        storage=run.storage,
        next_step=None if command else advice,
        preset=run.preset,
        overlays=run.overlays,
        spec_hash=run.spec_hash,
        steps_committed=run.num_committed if readable and run.total_steps is not None else None,
        total_steps=run.total_steps,
        attempt=run.attempt if run.attempt is not None else backend.num_attempts or None,
        charged_retries=backend.num_charged,
        backoff_limit=run.backoff_limit,
        last_step_age_s=age_s,
        started_at=backend.started_at,
        wandb_url=run.wandb_url,
        wandb_mode=run.wandb_mode,
    )


def _state(backend: BackendFacts, run: RunFacts) -> tuple[State, str]:
    if run.unreadable is not None:
        return State.UNKNOWN, run.unreadable
    state, reason = _state_of_readable(backend, run)
    return state, "; ".join([reason, *run.damaged[:1], *([run.out_of_reach] if run.out_of_reach else [])])


def _state_of_readable(backend: BackendFacts, run: RunFacts) -> tuple[State, str]:
    if backend.phase in _LIVE and not (backend.phase is Phase.SUSPENDED and run.complete):
        finishing = backend.phase is Phase.EXECUTING and run.complete
        return _LIVE[
            backend.phase
        ], "all steps are committed, the trainer is closing" if finishing else backend.reason
    if run.complete:
        by_the_book = backend.phase is Phase.COMPLETED
        return (
            State.SUCCEEDED,
            backend.reason if by_the_book else f"all steps are committed ({_how_it_ended(backend)})",
        )
    if backend.phase is Phase.UNREACHABLE:
        return State.UNKNOWN, backend.reason
    if backend.phase is Phase.COMPLETED:
        if run.total_steps is None:
            return State.SUCCEEDED, backend.reason
        return State.FAILED, f"ended as if done, but {_steps(run.missing_steps)} not committed"
    return _ENDED[backend.phase], _how_it_ended(backend)


def _how_it_ended(backend: BackendFacts) -> str:
    return "its object is gone from the cluster" if backend.phase is Phase.ABSENT else backend.reason


def _advice(state: State, backend: BackendFacts, run: RunFacts) -> str | None:
    if run.unreadable is not None:
        return None
    if state is State.SUCCEEDED:
        return suggest("collect", "--run", run.run, *run.options)
    if backend.next_step is not None:
        return backend.next_step
    if state is State.UNKNOWN:
        return None
    if state is State.SUSPENDED:
        return suggest("resume", run.run, *run.options)
    if backend.phase is Phase.FAILED:
        return suggest("logs", run.run, *run.options)
    if state in (State.FAILED, State.CANCELLED) or backend.phase is Phase.NEVER_STARTED:
        return run.submit_command
    return None


def _steps(numbers: tuple[int, ...]) -> str:
    if len(numbers) == 1:
        return f"step {numbers[0]} is"
    shown = ", ".join(str(n) for n in numbers[:5])
    return f"steps {shown}{', ...' if len(numbers) > 5 else ''} are"
