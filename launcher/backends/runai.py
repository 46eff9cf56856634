"""Runs as trainings of Run:ai, through its REST API.

A run is one training with the run's name, found again by name and by the run document in its environment.

* *Cancel* deletes the training, the only way to end one for good (``suspend`` keeps it, and nothing can be
  written on it afterwards). Run:ai keeps deleted trainings in a listing of their own, and there the run is
  found as cancelled. A later submit creates the next generation under another name, so nothing is deleted to
  be recreated.
* *Logs*: the REST API has none. They come from the run directory where this machine sees it, else through
  Kubernetes where the profile names a kubeconfig or a context.

Not seen on a live control plane: whether the server itself keeps names unique in a project (409), what the
listing of deleted trainings tells as their phase (the last one is assumed), and whether the pod of a retry
has another name than the one before.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from influence.rundir import ConflictError, RunSpec, difference, validate_run_name
from launcher.backends import AttemptFacts, Event, Refusal, order_taken
from launcher.backends.generations import object_name
from launcher.backends.runai_client import RunaiClient
from launcher.backends.runai_phases import ENDED, STOPPED, help_for, phase_of, reason_of
from launcher.backends.runai_refusals import (
    NameTakenError,
    NotThereError,
    OutcomeUnknownError,
    TokenRefusedError,
)
from launcher.backends.runai_trainings import TRAININGS, Generation, Trainings
from launcher.errors import BackendError
from launcher.kubernetes_values import spec_label
from launcher.profiles import Profile
from launcher.states import BackendFacts, Phase

if TYPE_CHECKING:
    from launcher.backends.runai_logs import TrainingLogs

_LOOKS = (0.0, 1.0, 2.0, 4.0)  # seconds before each look for what an order may have created
_POLL_S = 1.0
_SLACK_S = 60.0  # beyond the pod's grace, for the control plane and the cluster to agree
_GRACE_S = 120.0  # where the run's own is not known


class RunaiBackend:
    """The backend ``runai``.

    Args:
        client: speaks to another control plane than the profile's.
        sleep: how to wait between two looks.

    Raises:
        BackendError: the profile has no Run:ai, its address cannot be used, or credentials are missing.
    """

    name = "runai"

    def __init__(
        self,
        profile: Profile,
        client: RunaiClient | None = None,
        *,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if profile.runai is None:
            raise BackendError(
                f"cluster '{profile.name}' has no Run:ai",
                next_step="add runai: {url: ..., project: ...} to the cluster in launcher.yaml",
            )
        self._profile = profile
        self._access = profile.runai
        self._client = client or RunaiClient(profile.runai)
        self._trainings = Trainings(self._client, profile.runai)
        self._sleep = sleep
        self._logs: TrainingLogs | None = None

    def refusal(self, run: RunSpec) -> Refusal | None:
        num_nodes = run.spec["hardware"]["nodes"]
        if num_nodes == 1:
            return None
        lacking = (
            f"{num_nodes} nodes; a training of Run:ai is one pod. Several nodes go through the backend "
            f"kuberay in the project's namespace, runai-{self._access.project}"
        )
        return Refusal([lacking], str(run.spec["hardware"]["device"]))

    def document(self, run: str) -> RunSpec | None:
        found = self._trainings.of_run(validate_run_name(run))
        newest = found.newest
        if newest is None:
            if run in found.foreign:
                raise self._foreign(run)
            return None
        if newest.document is not None:
            return newest.document
        if newest.workload.deleted_at is not None:
            return None
        raise BackendError(
            f"{self._where(newest)} holds no run document that can be read",
            why="its environment has no INFL_RUN_JSON, or it was altered",
            next_step="use the version of the launcher that submitted it, or choose another --name",
        )

    def submit(self, run: RunSpec) -> bool:
        if (refusal := self.refusal(run)) is not None:
            raise BackendError(f"run '{run.run}' cannot run on Run:ai", why=f"it needs {refusal.lacking[0]}")
        found = self._trainings.of_run(validate_run_name(run.run))
        newest = found.newest
        if newest is not None:
            self._require_same_spec(newest, run)
        for generation in found.generations:
            facts = self._facts(generation)
            if facts.phase is Phase.STOPPING:
                raise BackendError(
                    f"{self._where(generation)} is being stopped; nothing was started",
                    why=facts.reason,
                    next_step="submit again when it has ended",
                )
            if facts.phase is Phase.UNREACHABLE:
                raise BackendError(
                    f"the state of {self._where(generation)} is unknown; nothing was started",
                    why=facts.reason,
                )
            if facts.phase not in ENDED:
                return False
            if generation.workload.deleted_at is None and generation.workload.num_pods:
                raise BackendError(
                    f"{self._where(generation)} has ended, and {generation.workload.num_pods} of its pods "
                    "still run; nothing was started",
                    next_step="submit again when they have ended",
                )
        number = 1 if newest is None else newest.number + 1
        if object_name(run.run, number) in found.foreign:
            raise self._foreign(object_name(run.run, number))
        return self._create(run, number)

    def get(self, run: str) -> BackendFacts:
        validate_run_name(run)
        try:
            return self._state(run)
        except BackendError as error:
            return BackendFacts(
                backend=self.name, phase=Phase.UNREACHABLE, next_step=error.next_step,
                reason=f"{error.what}: {error.why}" if error.why else error.what,
            )  # fmt: skip

    def list(self) -> Mapping[str, BackendFacts]:
        return {run: self._facts(each[-1]) for run, each in self._trainings.every().items()}

    def attempts(self, run: str) -> Sequence[int]:
        return self._opened_logs().attempts(run)

    def read_log(self, run: str, attempt: int, offset_bytes: int) -> bytes:
        return self._opened_logs().read(run, attempt, offset_bytes)

    def history(self, run: str) -> Sequence[AttemptFacts]:
        from launcher.backends.runai_story import attempts_of

        return attempts_of(run, self._trainings.of_run(run).generations, self._client, self._profile.root)

    def events(self, run: str) -> Sequence[Event]:
        from launcher.backends.runai_story import events_of

        return events_of(self._trainings.of_run(run).generations, self._client)

    def cancel(self, run: str, *, timeout_s: float | None = None) -> BackendFacts:
        facts = self._state(validate_run_name(run))
        if facts.phase is Phase.ABSENT or facts.phase in ENDED:
            return facts
        ended = self._stop(
            run,
            timeout_s,
            order=lambda path: self._client.delete(path),
            done=lambda facts, _: facts.phase in ENDED,
            under_way=lambda facts: facts.phase is Phase.STOPPING,
        )
        return ended or BackendFacts(
            backend=self.name, phase=Phase.CANCELLED, reason="cancelled; Run:ai keeps nothing of it"
        )

    def suspend(self, run: str, *, timeout_s: float | None = None) -> BackendFacts:
        stopped = self._stop(
            validate_run_name(run),
            timeout_s,
            order=lambda path: self._client.post(f"{path}/suspend"),
            done=lambda facts, word: word == STOPPED or facts.phase in (*ENDED, Phase.STOPPING),
            under_way=lambda facts: facts.phase is Phase.SUSPENDED,
        )
        return stopped or self._state(run)

    def resume(self, run: str) -> BackendFacts:
        newest = self._trainings.of_run(validate_run_name(run)).newest
        if newest is None or self._facts(newest).phase is not Phase.SUSPENDED:
            return self._state(run)
        doubt = self._order(lambda: self._client.post(f"{TRAININGS}/{newest.workload.id}/resume"))
        facts = self._state(run)
        if doubt is not None and facts.phase is Phase.SUSPENDED:
            raise doubt
        return facts

    def _opened_logs(self) -> TrainingLogs:
        if self._logs is None:
            from launcher.backends.runai_logs import TrainingLogs

            self._logs = TrainingLogs(self._profile)
        return self._logs

    def _stop(
        self,
        run: str,
        timeout_s: float | None,
        *,
        order: Callable[[str], object],
        done: Callable[[BackendFacts, str], bool],
        under_way: Callable[[BackendFacts], bool],
    ) -> BackendFacts | None:
        """Give an order once, and look until it is carried out or the time is up; None where nothing is left.

        Args:
            order: given the path of the newest training.
            done, under_way: judge by the facts; ``done`` also by Run:ai's word for the phase.

        Raises:
            BackendError: the order was refused, or its answer got lost and it does not show.
        """
        ordered: int | None = None
        doubt: BackendError | None = None
        num_looks = 0
        deadline_s: float | None = None
        while True:
            newest = self._trainings.of_run(run).newest
            if newest is None or (ordered is not None and newest.number < ordered):
                return None
            facts = self._facts(newest)
            if done(facts, newest.workload.phase):
                return facts
            if ordered is None:
                ordered = newest.number
                if not under_way(facts):
                    doubt = self._order(partial(order, f"{TRAININGS}/{newest.workload.id}"))
                    continue
            if doubt is not None and not under_way(facts):
                num_looks += 1
                if num_looks > len(_LOOKS):
                    raise doubt
            deadline_s = deadline_s or time.monotonic() + _wait_s(newest, timeout_s)
            if time.monotonic() >= deadline_s:
                return facts
            with order_taken() if doubt is None else nullcontext():
                self._sleep(_POLL_S)

    def _order(self, give: Callable[[], object]) -> BackendError | None:
        """Give an order; returns the error where it is not known whether it was carried out."""
        try:
            give()
        except (OutcomeUnknownError, NotThereError) as error:
            return error
        return None

    def _create(self, run: RunSpec, number: int) -> bool:
        """Create the training of a generation, or adopt the one that is there by then."""
        from launcher.render import render_template
        from launcher.runai_values import TEMPLATE, training_values

        place = self._trainings.place()
        name = object_name(run.run, number)
        values = training_values(run, name=name, project_id=place.project_id, cluster_id=place.cluster_id)
        body = json.loads(render_template(TEMPLATE, values))
        try:
            try:
                answer = self._client.create(TRAININGS, body)
            except TokenRefusedError:
                if self._trainings.named(run.run, name) is not None:
                    raise
                answer = self._client.create(TRAININGS, body)
        except (NameTakenError, OutcomeUnknownError) as error:
            doubt: BackendError = error
        else:
            given = answer.get("name") if isinstance(answer, dict) else None
            if given == name:
                return True
            doubt = self._client.misshapen(TRAININGS, f"the training '{name}' was to be created")
        return self._adopt(run, name, doubt)

    def _adopt(self, run: RunSpec, name: str, doubt: BackendError) -> bool:
        """After an order to create that was refused or of unknown outcome: look what has the name.

        Returns:
            Whether it is this submit's own.

        Raises:
            ConflictError: another spec has the name.
            BackendError: nothing or something foreign has it.
        """
        for wait_s in _LOOKS:
            if wait_s:
                self._sleep(wait_s)
            there = self._trainings.named(run.run, name)
            if isinstance(there, Generation):
                self._require_same_spec(there, run)
                return there.document is not None and there.document.provenance == run.provenance
            if there is not None:
                raise self._foreign(name)
        if isinstance(doubt, NameTakenError):
            raise BackendError(
                f"{self._client.place} says that the name '{name}' is taken, and lists nothing of that name "
                f"in project '{self._access.project}'",
                why=doubt.why,
                next_step="submit again in a minute (it may be in deletion), or choose another --name",
            )
        raise BackendError(
            f"it is not known whether '{name}' was created: {doubt.what}",
            why=doubt.why,
            next_step="submit again: what is there by then is adopted, and never created twice",
        )

    def _require_same_spec(self, generation: Generation, run: RunSpec) -> None:
        """Raises ConflictError where another spec has the name."""
        if generation.document is not None:
            if generation.document.spec_hash != run.spec_hash:
                raise ConflictError(self._where(generation), difference(generation.document.spec, run.spec))
        elif generation.spec_label not in (None, spec_label(run.spec_hash)):
            raise ConflictError(self._where(generation), ["the spec hash (its document cannot be read)"])
        elif generation.spec_label is None and generation.workload.deleted_at is None:
            raise self._foreign(generation.workload.name)

    def _state(self, run: str) -> BackendFacts:
        found = self._trainings.of_run(run)
        if found.newest is not None:
            return self._facts(found.newest)
        reason = f"project '{self._access.project}' has no run '{run}'"
        if run in found.foreign:
            reason += "; a workload of that name is there, and no run of the launcher's"
        return BackendFacts(backend=self.name, phase=Phase.ABSENT, reason=reason)

    def _facts(self, generation: Generation) -> BackendFacts:
        workload = generation.workload
        phase, reason = phase_of(workload.phase), reason_of(workload.phase, workload.message)
        if workload.deleted_at is not None:
            if phase in ENDED:
                reason += f"; deleted at {workload.deleted_at}"
            else:
                phase, reason = (
                    Phase.CANCELLED,
                    f"cancelled: its training was deleted at {workload.deleted_at}",
                )
        return BackendFacts(
            backend=self.name, phase=phase, reason=reason, started_at=workload.created_at,
            document=generation.document, next_step=help_for(workload.phase_reason),
        )  # fmt: skip

    def _where(self, generation: Generation) -> str:
        return f"training '{generation.workload.name}' in Run:ai's project '{self._access.project}'"

    def _foreign(self, name: str) -> BackendError:
        return BackendError(
            f"a workload named '{name}' is in Run:ai's project '{self._access.project}', and no run of the "
            "launcher's",
            why="it does not carry the run's label and document",
            next_step="choose another --name for the run, or have that workload removed",
        )


def _wait_s(generation: Generation, timeout_s: float | None) -> float:
    """How long a pod may take to end, seconds."""
    if timeout_s is not None:
        return timeout_s
    retry = {} if generation.document is None else generation.document.spec.get("retry", {})
    return float(retry.get("grace_period_s", _GRACE_S)) + _SLACK_S
