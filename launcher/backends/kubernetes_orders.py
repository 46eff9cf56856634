"""Orders to the cluster: create a run's Job or adopt it, cancel, suspend, resume; never delete."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextlib import suppress

from influence.rundir import ConflictError, RunSpec, difference
from influence.rundir.clock import utc_now
from launcher.backends.generations import Generation, generations_by_run, object_name
from launcher.backends.job_facts import CANCELLED_ANNOTATION, SUSPENDED_ANNOTATION, JobStatus
from launcher.backends.kubernetes_api import Object
from launcher.backends.kubernetes_errors import ApiConflict, ApiForbidden, ApiNotFound, ApiUnanswered
from launcher.backends.kubernetes_reading import JobReader, RunJobs, document
from launcher.errors import BackendError
from launcher.kubernetes_values import RUN_LABEL, TEMPLATE, job_values
from launcher.render import parse_manifest, render_template
from launcher.states import BackendFacts

SUBMISSION_ANNOTATION = "infl/submission"
"""Which submit created the object: after a lost answer it tells whose it is."""
_MAX_ROUNDS = 5
_SLACK_S = 60.0  # beyond the pods' grace: for the controllers to notice


class JobOrders:
    """Changes to a namespace's Jobs."""

    def __init__(self, reader: JobReader) -> None:
        self._reader = reader
        self._api = reader.api

    def submit(self, run: RunSpec) -> bool:
        """As ``Backend.submit``."""
        for _ in range(_MAX_ROUNDS):
            jobs = self._reader.jobs_and_pods(run.run)
            number = 1
            if jobs is not None:
                self._require_same_spec(jobs.newest, run)
                if not self._may_start_again(jobs):
                    return False
                number = jobs.newest.number + 1
            created = self._create(run, object_name(run.run, number))
            if created is not None:
                return created
        raise BackendError(
            f"the Jobs of run '{run.run}' keep changing while this one is submitted",
            next_step="see what status says, then submit again",
        )

    def _require_same_spec(self, generation: Generation, run: RunSpec) -> None:
        existing = document(generation, self._reader.namespace)
        if existing.spec_hash != run.spec_hash:
            place = f"Job {self._reader.namespace}/{generation.name}"
            raise ConflictError(place, difference(existing.spec, run.spec))

    def _may_start_again(self, jobs: RunJobs) -> bool:
        """Whether the newest Job has ended and nothing of any is left; False where one is under way."""
        status = JobStatus.of(jobs.newest.item)
        living = [pod for pod in jobs.all_pods() if not pod.ended]
        if status.cancelled and not status.ended:
            raise BackendError(
                f"run '{jobs.run}' is being cancelled",
                why=living[0].where + " is still stopping" if living else "its Job has not ended yet",
                next_step="submit again when it has ended; status --wait tells when",
            )
        if not status.ended:
            return False
        if living:
            raise BackendError(
                f"run '{jobs.run}' cannot be started again yet: {living[0].where} is still stopping",
                why="two pods of one run would write the same directory",
                next_step="submit again when it is gone",
            )
        return True

    def _create(self, run: RunSpec, name: str) -> bool | None:
        """Whether this call created the Job; None where the name was taken meanwhile, so look again."""
        manifest = parse_manifest(render_template(TEMPLATE, job_values(run, object_name=name)), TEMPLATE)
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
                why="a Job has it that is another run's, or no run at all",
                next_step="choose another --name or --suffix",
            )
        return None

    def _found(self, name: str) -> Object | None:
        try:
            return self._api.get(self._reader.path(name))
        except ApiNotFound:
            return None

    def cancel(self, run: str, timeout_s: float | None) -> BackendFacts:
        """As ``Backend.cancel``: the Job gets a deadline of a second, so its controller ends it and its pod.

        A suspended Job stays suspended, and so never runs again.
        """
        jobs = self._reader.jobs(run)
        if jobs is None or JobStatus.of(jobs.newest.item).ended:
            return self._reader.facts(run)
        status = JobStatus.of(jobs.newest.item)
        change = {
            "metadata": {"annotations": {CANCELLED_ANNOTATION: utc_now()}},
            "spec": {"activeDeadlineSeconds": 1},
        }
        self._patch(jobs, change)
        if status.kueue_queue is not None:
            with suppress(ApiForbidden, ApiNotFound):  # it would be admitted, and end after that second
                self._reader.workloads.set_active(status.uid, False)
        return self._wait(jobs, lambda now: now.ended, timeout_s)

    def suspend(self, run: str, timeout_s: float | None) -> BackendFacts:
        """As ``Backend.suspend``."""
        jobs = self._reader.jobs(run)
        status = None if jobs is None else JobStatus.of(jobs.newest.item)
        if jobs is None or status is None or status.ended or status.cancelled:
            return self._reader.facts(run)
        noted = {"metadata": {"annotations": {SUSPENDED_ANNOTATION: utc_now()}}}
        if status.kueue_queue is None:
            self._patch(jobs, {**noted, "spec": {"suspend": True}})
        else:
            # Kueue owns the Job's own switch, and would turn it back.
            if not self._reader.workloads.set_active(status.uid, False):
                raise BackendError(
                    f"run '{run}' cannot be suspended: Kueue has made no Workload for its Job yet",
                    next_step="try again in a moment, or cancel it",
                )
            self._patch(jobs, noted)
        return self._wait(
            jobs, lambda now: now.suspended and not now.num_active and not now.num_terminating, timeout_s
        )

    def resume(self, run: str) -> BackendFacts:
        """As ``Backend.resume``."""
        jobs = self._reader.jobs(run)
        status = None if jobs is None else JobStatus.of(jobs.newest.item)
        if jobs is None or status is None or status.ended:
            return self._reader.facts(run)
        if status.cancelled:
            raise BackendError(f"run '{run}' is cancelled and cannot be resumed", next_step="submit it again")
        if status.suspended_by_us or (status.suspended and status.kueue_queue is None):
            noted = {"metadata": {"annotations": {SUSPENDED_ANNOTATION: None}}}
            if status.kueue_queue is None:
                self._patch(jobs, {**noted, "spec": {"suspend": False}})
            else:
                self._reader.workloads.set_active(status.uid, True)
                self._patch(jobs, noted)
        return self._reader.facts(run)

    def _patch(self, jobs: RunJobs, change: Object) -> None:
        self._api.patch(self._reader.path(jobs.newest.name), change)

    def _wait(
        self, jobs: RunJobs, done: Callable[[JobStatus], bool], timeout_s: float | None
    ) -> BackendFacts:
        """Look at the Job until it is as wanted, for the pods' grace and some slack by default."""
        if timeout_s is None:
            template = jobs.newest.item["spec"]["template"]["spec"]
            timeout_s = float(template.get("terminationGracePeriodSeconds") or 30) + _SLACK_S
        deadline = time.monotonic() + timeout_s
        name = jobs.newest.name
        with suppress(ApiUnanswered):  # whether it answers now is asked below
            for seen in self._api.watch(
                self._reader.path(), timeout_s=timeout_s, labelSelector=f"{RUN_LABEL}={jobs.run}"
            ):
                if name not in seen or done(JobStatus.of(seen[name])) or time.monotonic() >= deadline:
                    break
        return self._reader.facts(jobs.run)
