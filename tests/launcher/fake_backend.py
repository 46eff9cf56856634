"""A cluster in memory that keeps the protocol of ``launcher.backends``, for tests of what stands above it.

Its server holds one object a generation of a run, as a cluster does: none is deleted for a submit, a new one
is made when the last has ended. What happens on the cluster is for the test to say: `FakeBackend.becomes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from influence.rundir import ConflictError, RunSpec, Verdict, difference
from launcher.backends import AttemptFacts, Event, Refusal
from launcher.errors import BackendError
from launcher.profiles import Profile
from launcher.site import Site
from launcher.states import BackendFacts, Phase

ENDED = (Phase.COMPLETED, Phase.FAILED, Phase.CANCELLED)


@dataclass
class FakeObject:
    """One generation of a run on the server."""

    run: RunSpec
    phase: Phase = Phase.QUEUED
    reason: str = "waits for a node"
    history: list[AttemptFacts] = field(default_factory=list)

    @property
    def live(self) -> bool:
        return self.phase not in ENDED


@dataclass
class FakeBackend:
    """Give it to a Site in the place of a real backend."""

    objects: dict[str, list[FakeObject]] = field(default_factory=dict)
    reachable: bool = True
    calls: list[str] = field(default_factory=list)
    logs: dict[tuple[str, int], bytes] = field(default_factory=dict)
    happened: list[Event] = field(default_factory=list)
    lacking: tuple[str, ...] = ()
    name: str = "kubernetes"

    # --- the protocol

    def refusal(self, run: RunSpec) -> Refusal | None:
        return Refusal(self.lacking, "cuda") if self.lacking else None

    def document(self, run: str) -> RunSpec | None:
        self._ask("document")
        latest = self._latest(run)
        return None if latest is None else latest.run

    def submit(self, run: RunSpec) -> bool:
        self._ask("submit")
        latest = self._latest(run.run)
        if latest is not None and latest.run.spec_hash != run.spec_hash:
            raise ConflictError(Path(run.run), difference(latest.run.spec, run.spec))
        if latest is not None and latest.live:
            return False
        self.objects.setdefault(run.run, []).append(FakeObject(run))
        return True

    def get(self, run: str) -> BackendFacts:
        self.calls.append("get")
        if not self.reachable:
            return BackendFacts(
                backend=self.name, phase=Phase.UNREACHABLE, reason="the server did not answer"
            )
        return self._facts(run)

    def list(self) -> Mapping[str, BackendFacts]:
        self._ask("list")
        return {run: self._facts(run) for run in self.objects if self.objects[run]}

    def attempts(self, run: str) -> Sequence[int]:
        self._ask("attempts")
        return sorted(number for name, number in self.logs if name == run)

    def read_log(self, run: str, attempt: int, offset_bytes: int) -> bytes:
        self._ask("read_log")
        return self.logs.get((run, attempt), b"")[offset_bytes:]

    def history(self, run: str) -> Sequence[AttemptFacts]:
        self._ask("history")
        return [facts for each in self.objects.get(run, []) for facts in each.history]

    def events(self, run: str) -> Sequence[Event]:
        self._ask("events")
        return self.happened

    def cancel(self, run: str, *, timeout_s: float | None = None) -> BackendFacts:
        return self._order("cancel", run, Phase.CANCELLED, "cancelled")

    def suspend(self, run: str, *, timeout_s: float | None = None) -> BackendFacts:
        return self._order("suspend", run, Phase.SUSPENDED, "suspended")

    def resume(self, run: str) -> BackendFacts:
        latest = self._latest(run)
        if latest is None or latest.phase is not Phase.SUSPENDED:
            return self._facts(run)
        return self._order("resume", run, Phase.QUEUED, "waits for a node")

    # --- what happens on a cluster

    def becomes(self, run: str, phase: Phase, reason: str = "because") -> None:
        """The run's latest object changes its phase; one that has ended stays as it ended."""
        latest = self._latest(run)
        if latest is not None and latest.live:
            latest.phase, latest.reason = phase, reason

    def forget(self, run: str) -> None:
        """The server removes objects that have ended (their time to live is over)."""
        self.objects[run] = [each for each in self.objects.get(run, []) if each.live]

    def _order(self, call: str, run: str, phase: Phase, reason: str) -> BackendFacts:
        self._ask(call)
        self.becomes(run, phase, reason)
        return self._facts(run)

    def _facts(self, run: str) -> BackendFacts:
        latest = self._latest(run)
        if latest is None:
            return BackendFacts(backend=self.name, phase=Phase.ABSENT, reason="no such object")
        return BackendFacts(
            backend=self.name, phase=latest.phase, reason=latest.reason, document=latest.run,
            num_attempts=len(self.history_of(run)), num_charged=sum(
                facts.verdict is Verdict.CHARGED_RETRY for facts in self.history_of(run)
            ),
        )  # fmt: skip

    def history_of(self, run: str) -> list[AttemptFacts]:
        return [facts for each in self.objects.get(run, []) for facts in each.history]

    def _latest(self, run: str) -> FakeObject | None:
        generations = self.objects.get(run)
        return generations[-1] if generations else None

    def _ask(self, call: str) -> None:
        self.calls.append(call)
        if not self.reachable:
            raise BackendError("the server did not answer", next_step="launcher doctor")


PROFILE = Profile(name="lab", backend="kubernetes", options=("--cluster", "lab"), source="launcher.yaml:3")


def fake_site(root: Path | None = None, backend: FakeBackend | None = None) -> Site:
    """A cluster named ``lab``, in memory."""
    return Site(replace(PROFILE, root=root), FakeBackend() if backend is None else backend, PROFILE.options)
