"""Orders to the cluster: create a run's object or adopt it, cancel, suspend, resume; never delete.

The same for Jobs and RayJobs: what differs between them, a `Reader` tells.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import suppress

from influence.rundir import ConflictError, RunSpec, difference
from influence.rundir.clock import utc_now
from launcher import errors
from launcher.backends import order_taken
from launcher.backends.generations import Generation, generations_by_run, object_name
from launcher.backends.job_facts import CANCELLED_ANNOTATION, SUSPENDED_ANNOTATION
from launcher.backends.kubernetes_api import Object
from launcher.backends.kubernetes_errors import ApiConflict, ApiForbidden, ApiNotFound, ApiUnanswered
from launcher.backends.kueue import is_deactivated
from launcher.backends.other_kinds import of_another_kind
from launcher.backends.run_pods import list_pods, living_pods
from launcher.backends.server_reader import ObjectStatus, Reader, RunObjects
from launcher.errors import BackendError
from launcher.kubernetes_values import RUN_LABEL
from launcher.states import BackendFacts, Phase

SUBMISSION_ANNOTATION = "infl/submission"
"""Which submit created the object: after a lost answer it tells whose it is."""
_MAX_ROUNDS = 5
_POLL_S = 1.0
_SLACK_S = 60.0  # beyond the pods' grace: for the controllers to notice


class Orders:
    """Changes to a namespace's runs."""

    def __init__(self, reader: Reader[RunObjects]) -> None:
        self._reader = reader
        self._api = reader.api

    def submit(self, run: RunSpec) -> bool:
        """As ``Backend.submit``."""
        for _ in range(_MAX_ROUNDS):
            objects = self._reader.objects_and_pods(run.run)
            number = 1
            if objects is not None:
                self._require_same_spec(objects.newest, run)
                if not self._may_start_again(objects):
                    return False
                number = objects.newest.number + 1
            if not self._is_nothing_left(run.run, number):
                continue
            self._require_no_other_kind(run.run)
            created = self._create(run, object_name(run.run, number))
            if created is not None:
                return created
        raise BackendError(
            f"the {self._reader.kind}s of run '{run.run}' keep changing while this one is submitted",
            next_step="see what status says, then submit again",
        )

    def _require_same_spec(self, generation: Generation, run: RunSpec) -> None:
        existing = self._reader.document(generation)
        if existing.spec_hash != run.spec_hash:
            place = f"{self._reader.kind} {self._reader.namespace}/{generation.name}"
            raise ConflictError(place, difference(existing.spec, run.spec))

    def _may_start_again(self, objects: RunObjects) -> bool:
        """Whether the newest object has ended and nothing of any is left; False where one is under way."""
        status = self._reader.status(objects.newest.item)
        living = [pod for pod in objects.all_pods() if not pod.ended]
        if status.deleting and not status.ended:
            raise errors.ConflictError(
                f"run '{objects.run}' cannot be started: its {self._reader.kind} is being deleted",
                why=f"{living[0].where} has not ended" if living else "it is not gone yet",
                next_step="submit again when it is gone",
            )
        if status.cancelled and not status.ended:
            raise BackendError(
                f"run '{objects.run}' is being cancelled",
                why=living[0].where + " is still stopping"
                if living
                else f"its {self._reader.kind} has not ended yet",
                next_step="submit again when it has ended; status --wait tells when",
            )
        if not status.ended:
            return False
        if living:
            raise BackendError(
                f"run '{objects.run}' cannot be started again yet: {living[0].where} is still stopping",
                why="two pods of one run would write the same directory",
                next_step="submit again when it is gone",
            )
        return True

    def _is_nothing_left(self, run: str, number: int) -> bool:
        """Refuse while a pod of the run lives, whatever made it: its object may have been deleted.

        False where another submit has made the generation `number` since the objects were read: look again.
        """
        living = living_pods(list_pods(self._api, self._reader.namespace, run, living=True))
        if not living:
            return True
        now = self._reader.objects(run)
        if now is not None and now.newest.number >= number:
            return False
        stopping = living[0].facts.delete_by is not None
        raise errors.ConflictError(
            f"run '{run}' cannot be started: {living[0].words}",
            why="two pods of one run would write the same directory",
            next_step="submit again when it is gone"
            if stopping
            else "use the backend that started it; or let it end, or have it deleted, then submit again: "
            f"kubectl delete pod -n {self._reader.namespace} {living[0].facts.name}",
        )

    def _require_no_other_kind(self, run: str) -> None:
        other = of_another_kind(self._api, self._reader.namespace, run, self._reader.kind)
        if other is None:
            return
        there, backend = other
        raise errors.ConflictError(
            f"run '{run}' cannot be started as a {self._reader.kind}: it is there as {there}",
            why="two pods of one run would write the same directory",
            next_step=f"use --backend {backend} for it, or give this one another name (--name or --suffix)",
        )

    def _create(self, run: RunSpec, name: str) -> bool | None:
        """Whether this call created the object; None where the name was taken meanwhile, so look again."""
        manifest = self._reader.manifest(run, name)
        submission = uuid.uuid4().hex
        manifest["metadata"]["annotations"][SUBMISSION_ANNOTATION] = submission
        there: Object | None
        try:
            there = self._api.create(self._reader.path(), manifest)
        except ApiConflict:
            there = self._found(name)
        if there is None:
            return None
        annotations = there["metadata"].get("annotations") or {}
        if annotations.get(SUBMISSION_ANNOTATION) == submission:
            return True
        if run.run not in generations_by_run([there]):
            raise BackendError(
                f"the name '{name}' is taken in namespace '{self._reader.namespace}'",
                why=f"a {self._reader.kind} has it that is another run's, or no run at all",
                next_step="choose another --name or --suffix",
            )
        return None

    def _found(self, name: str) -> Object | None:
        try:
            return self._api.get(self._reader.path(name))
        except ApiNotFound:
            return None

    def cancel(self, run: str, timeout_s: float | None) -> BackendFacts:
        """As ``Backend.cancel``: by a deadline of a second, so that the controller ends the pods.

        A suspended one stays suspended, and so never runs again.
        """
        objects = self._reader.objects(run)
        if objects is None or self._reader.status(objects.newest.item).ended:
            return self._reader.facts(run)
        status = self._reader.status(objects.newest.item)
        change = {
            "metadata": {"annotations": {CANCELLED_ANNOTATION: utc_now()}},
            "spec": dict(self._reader.ending),
        }
        self._patch(objects, change)
        if status.kueue_queue is not None:
            with suppress(ApiForbidden, ApiNotFound):  # it would be admitted, and end after that second
                self._reader.workloads.set_active(status.uid, False)
        return self._wait(objects, lambda now: now.ended, timeout_s)

    def suspend(self, run: str, timeout_s: float | None) -> BackendFacts:
        """As ``Backend.suspend``."""
        objects = self._reader.objects(run)
        status = None if objects is None else self._reader.status(objects.newest.item)
        if objects is None or status is None or status.ended or status.cancelled:
            return self._reader.facts(run)
        self._require_no_deletion(objects, "suspended")
        noted = {"metadata": {"annotations": {SUSPENDED_ANNOTATION: utc_now()}}}
        if status.kueue_queue is None:
            self._patch(objects, {**noted, "spec": {"suspend": True}})
        else:
            # Kueue owns the object's own switch, and would turn it back.
            if self._reader.workloads.of_job(status.uid) is None:
                raise BackendError(
                    f"run '{run}' cannot be suspended: Kueue has made no Workload for it yet",
                    next_step="try again in a moment, or cancel it",
                )
            # The note first: where this ends between the two, the run goes on, and either order may follow.
            self._patch(objects, noted)
            self._reader.workloads.set_active(status.uid, False)
        return self._wait(objects, lambda now: now.at_rest, timeout_s)

    def resume(self, run: str) -> BackendFacts:
        """As ``Backend.resume``."""
        objects = self._reader.objects(run)
        status = None if objects is None else self._reader.status(objects.newest.item)
        if objects is None or status is None or status.ended:
            return self._reader.facts(run)
        if status.cancelled:
            raise BackendError(f"run '{run}' is cancelled and cannot be resumed", next_step="submit it again")
        self._require_no_deletion(objects, "resumed")
        if status.suspended_by_us or (status.suspended and self._only_we_resume(status)):
            noted = {"metadata": {"annotations": {SUSPENDED_ANNOTATION: None}}}
            if status.kueue_queue is None:
                self._patch(objects, {**noted, "spec": {"suspend": False}})
            else:
                self._reader.workloads.set_active(status.uid, True)
                self._patch(objects, noted)
        return self._reader.facts(run)

    def _only_we_resume(self, status: ObjectStatus) -> bool:
        """Whether a suspended object stays so: Kueue lets none in whose Workload somebody deactivated."""
        if status.kueue_queue is None:
            return True
        workload = self._reader.workloads.of_job(status.uid)
        return workload is not None and is_deactivated(workload)

    def _require_no_deletion(self, objects: RunObjects, order: str) -> None:
        if self._reader.status(objects.newest.item).deleting:
            raise BackendError(
                f"run '{objects.run}' cannot be {order}: its {self._reader.kind} is being deleted",
                next_step="submit the run again when it is gone",
            )

    def _patch(self, objects: RunObjects, change: Object) -> None:
        self._api.patch(self._reader.path(objects.newest.name), change)

    @order_taken()
    def _wait(
        self, objects: RunObjects, done: Callable[[ObjectStatus], bool], timeout_s: float | None
    ) -> BackendFacts:
        """Look at the object until it is as wanted, for the pods' grace and some slack by default."""
        if timeout_s is None:
            timeout_s = self._reader.grace_s(objects.newest.item) + _SLACK_S
        deadline = time.monotonic() + timeout_s
        name = objects.newest.name
        with suppress(ApiUnanswered):  # whether it answers now is asked below
            for seen in self._api.watch(
                self._reader.path(), timeout_s=timeout_s, labelSelector=f"{RUN_LABEL}={objects.run}"
            ):
                if name not in seen or done(self._reader.status(seen[name])) or time.monotonic() >= deadline:
                    break
        # A RayJob has ended before its pods are gone.
        while (facts := self._reader.facts(objects.run)).phase is Phase.STOPPING:
            if time.monotonic() >= deadline:
                break
            time.sleep(_POLL_S)
        return facts
