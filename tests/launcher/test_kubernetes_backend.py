"""The backend over a stub of the API server: questions counted, lost answers, conflicts, no run ever lost."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from influence.rundir import ConflictError, RunPaths, claim_attempt, create_run
from influence.rundir.exits import Verdict
from launcher import errors
from launcher.backends import kubernetes_api, pod_log, server_backend, server_clock
from launcher.backends.kubernetes import KubernetesBackend
from launcher.backends.kubernetes_api import MAX_TRIES
from launcher.backends.kubernetes_errors import ApiForbidden
from launcher.errors import BackendError
from launcher.states import Phase
from tests.launcher.kubernetes_objects import EVENTS, JOBS, PODS, RUN, condition, job, lab_run, pod
from tests.launcher.kubernetes_stub import TOKEN, KubernetesStub, running_stub, status
from tests.own_time import give_own_time

WORKLOADS = "/apis/kueue.x-k8s.io/v1beta1/namespaces/lab/workloads"
KUEUE = ("cluster.scheduler=kueue", "cluster.queue=research")


@pytest.fixture
def stub() -> Iterator[KubernetesStub]:
    with running_stub() as stub:
        yield stub


@pytest.fixture
def backend(stub: KubernetesStub, tmp_path: Path) -> KubernetesBackend:
    return KubernetesBackend(stub.profile(tmp_path))


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_api, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(pod_log, "_RECONNECT_S", 0.01)


def put_job(stub: KubernetesStub, *, name: str = RUN, **status: Any) -> dict[str, Any]:
    run = lab_run()
    return stub.put(f"{JOBS}/{name}", job(run, name=name, uid=f"job-{name}", **status))


def put_pod(stub: KubernetesStub, name: str, phase: str = "Running", *, of: str = RUN, **status: Any) -> None:
    stub.put(f"{PODS}/{name}", pod(name, phase, job_uid=f"job-{of}", **status))


def asked(stub: KubernetesStub) -> list[str]:
    return [f"{r.method} {r.path.rpartition('/')[2]}" for r in stub.requests]


FAILED = {"failed": 5, "conditions": [condition("Failed", "BackoffLimitExceeded")]}


# -- submit


def test_a_new_run_is_three_questions_and_one_job(backend: KubernetesBackend, stub: KubernetesStub) -> None:
    run = lab_run()
    assert backend.submit(run) is True
    assert asked(stub) == ["GET jobs", "GET pods", "GET rayjobs", "POST jobs"]
    assert backend.document(RUN) == run
    assert backend.submit(run) is False
    assert stub.count("POST", "/jobs$") == 1


@pytest.mark.parametrize("drop", [False, True])
def test_a_submit_whose_answer_was_lost_knows_its_own_job(
    backend: KubernetesBackend, stub: KubernetesStub, drop: bool
) -> None:
    stub.fail("POST", "/jobs$", status=502, carried_out=True, drop=drop)
    assert backend.submit(lab_run()) is True
    assert stub.count("POST", "/jobs$") == 1
    assert len(stub.objects) == 1


def test_a_submit_whose_request_was_lost_while_another_took_the_name_adopts(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    def somebody_else(request: Any) -> None:
        if request.method == "POST" and not stub.objects:
            put_job(stub, active=1)

    stub.on_request = somebody_else
    stub.fail("POST", "/jobs$", status=503)
    assert backend.submit(lab_run()) is False
    assert len(stub.objects) == 1


def test_a_generation_that_another_submit_made_while_this_one_looked_is_adopted(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    """Its pod may be there before this submit has seen its Job."""
    put_job(stub, **FAILED)
    put_pod(stub, "a", "Failed", exit_code=1)

    def somebody_else(request: Any) -> None:
        if request.path.endswith("/pods") and f"{JOBS}/{RUN}-r2" not in stub.objects and num_lists() > 1:
            put_job(stub, name=f"{RUN}-r2", active=1, ready=1)
            put_pod(stub, "b", of=f"{RUN}-r2")

    def num_lists() -> int:
        return stub.count("GET", "/pods$")

    stub.on_request = somebody_else
    assert backend.submit(lab_run()) is False
    assert stub.count("POST", "") == 0


def test_another_spec_under_the_name_is_refused_with_the_difference(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_job(stub, active=1, ready=1)
    with pytest.raises(ConflictError) as caught:
        backend.submit(lab_run("influence.damping=0.5"))
    assert caught.value.difference == ["influence.damping: 0.1 -> 0.5"]
    assert stub.count("POST", "") == stub.count("PATCH", "") == 0


def test_another_spec_that_takes_the_name_in_between_is_refused_too(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    stub.on_request = lambda r: put_job(stub, active=1) if r.method == "POST" and not stub.objects else None
    with pytest.raises(ConflictError):
        backend.submit(lab_run("influence.damping=0.5"))


def test_a_run_that_has_ended_gets_its_next_generation(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_job(stub, **FAILED)
    put_pod(stub, "a", "Failed", exit_code=1)
    assert backend.submit(lab_run()) is True
    assert f"{JOBS}/{RUN}-r2" in stub.objects
    put_job(stub, name=f"{RUN}-r2", **FAILED)
    assert backend.submit(lab_run()) is True
    assert f"{JOBS}/{RUN}-r3" in stub.objects
    assert stub.count("DELETE", "") == 0


def test_no_generation_begins_while_a_pod_of_an_earlier_one_is_left(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_job(stub, **FAILED)
    put_job(stub, name=f"{RUN}-r2", **FAILED)
    put_pod(stub, "left-over", "Running")
    with pytest.raises(BackendError, match="pod left-over on node gpu-3 is still stopping"):
        backend.submit(lab_run())
    assert stub.count("POST", "") == 0


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("deleted", [True, False])
def test_a_pod_whose_job_was_deleted_keeps_the_run_from_being_started_again(
    backend: KubernetesBackend, stub: KubernetesStub, owned: bool, deleted: bool
) -> None:
    run = lab_run()
    item = pod("left-over", job_uid="gone")
    item["spec"] = job(run)["spec"]["template"]["spec"] | {"nodeName": "gpu-3"}
    item["metadata"]["ownerReferences"][0]["name"] = RUN
    if not owned:
        del item["metadata"]["ownerReferences"]
    if deleted:
        item["metadata"]["deletionTimestamp"] = "2036-02-21T11:30:00Z"
    stub.put(f"{PODS}/left-over", item)
    facts = backend.get(RUN)
    assert facts.phase is (Phase.STOPPING if deleted else Phase.EXECUTING)
    assert "no Job of it is in lab, but pod left-over on node gpu-3" in facts.reason
    assert (f"made by Job {RUN}" in facts.reason) is owned
    assert facts.document == backend.document(RUN) == run
    assert backend.list()[RUN] == facts
    with pytest.raises(errors.ConflictError, match="cannot be started: pod left-over"):
        backend.submit(run)
    assert stub.count("POST", "") == 0
    item["status"]["phase"] = "Failed"
    assert backend.get(RUN).phase is Phase.ABSENT
    assert backend.submit(run) is True


@pytest.mark.parametrize("suspended", [False, True])
def test_a_job_that_is_being_deleted_is_not_adopted(
    backend: KubernetesBackend, stub: KubernetesStub, suspended: bool
) -> None:
    item = put_job(stub, active=1, ready=1)
    item["spec"]["suspend"] = suspended
    item["metadata"] |= {"deletionTimestamp": "2026-02-21T11:30:00Z"}
    assert backend.get(RUN).phase is backend.list()[RUN].phase is Phase.STOPPING
    assert "being deleted" in backend.get(RUN).reason
    with pytest.raises(errors.ConflictError, match="is being deleted"):
        backend.submit(lab_run())
    for order in (backend.suspend, backend.resume):
        with pytest.raises(BackendError, match="is being deleted"):
            order(RUN)
    assert stub.count("POST", "") == stub.count("PATCH", "") == 0


def test_a_run_that_is_there_as_a_rayjob_is_not_started_as_a_job_too(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    path = f"/apis/ray.io/v1/namespaces/lab/rayjobs/{RUN}"
    item = job(lab_run()) | {"kind": "RayJob", "status": {"jobDeploymentStatus": "Running"}}
    stub.put(path, item)
    with pytest.raises(errors.ConflictError, match=f"it is there as RayJob lab/{RUN}") as caught:
        backend.submit(lab_run())
    assert "--backend kuberay" in str(caught.value.next_step)
    assert stub.count("POST", "") == 0
    item["status"]["jobDeploymentStatus"] = "Failed"
    assert backend.submit(lab_run()) is True


@pytest.mark.parametrize("code", [403, 404])
def test_a_cluster_that_tells_of_no_rayjobs_runs_jobs(
    backend: KubernetesBackend, stub: KubernetesStub, code: int
) -> None:
    stub.fail("GET", "/rayjobs$", status=code, body=status(code, "", "no"))
    assert backend.submit(lab_run()) is True


def test_a_run_that_is_being_cancelled_is_not_started_again(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    item = put_job(stub, active=1, ready=1)
    item["metadata"]["annotations"]["infl/cancelled-at"] = "2026-02-21T11:30:00Z"
    with pytest.raises(BackendError, match="is being cancelled"):
        backend.submit(lab_run())


def test_a_name_that_something_else_has_is_said(backend: KubernetesBackend, stub: KubernetesStub) -> None:
    stub.put(f"{JOBS}/{RUN}", {"metadata": {}, "spec": {}})
    with pytest.raises(BackendError, match="is taken in namespace 'lab'"):
        backend.document(RUN)
    with pytest.raises(BackendError, match="is taken in namespace 'lab'"):
        backend.submit(lab_run())
    put_job(stub, **FAILED)
    other = job(lab_run(), uid="x")
    other["metadata"]["labels"]["infl/run"] = f"{RUN}-r2"  # a run that is really named so
    stub.put(f"{JOBS}/{RUN}-r2", other)
    with pytest.raises(BackendError, match=f"'{RUN}-r2' is taken"):
        backend.submit(lab_run())


@pytest.mark.parametrize(
    ("setting", "words"),
    [("hardware.nodes=2", "use --backend kuberay"), ("cluster.node_pools=[a]", "cluster.node_selector")],
)
def test_what_a_job_cannot_do_is_refused_without_a_question(
    backend: KubernetesBackend, stub: KubernetesStub, setting: str, words: str
) -> None:
    refusal = backend.refusal(lab_run(setting))
    assert refusal is not None and words in refusal.lacking[0]
    assert backend.refusal(lab_run()) is None
    assert stub.requests == []


# -- get and list


def test_a_run_that_is_not_there_is_absent(backend: KubernetesBackend, stub: KubernetesStub) -> None:
    assert backend.get(RUN).phase is Phase.ABSENT
    assert asked(stub) == ["GET jobs", "GET pods"]


def test_a_running_job_is_one_question(backend: KubernetesBackend, stub: KubernetesStub) -> None:
    put_job(stub, active=1, ready=1)
    facts = backend.get(RUN)
    assert (facts.phase, facts.num_charged, facts.num_attempts) == (Phase.EXECUTING, 0, 1)
    assert facts.document == lab_run()
    assert facts.started_at == "2026-02-21T11:00:00Z"
    assert asked(stub) == ["GET jobs"]


def test_a_foreign_object_hides_no_run(backend: KubernetesBackend, stub: KubernetesStub) -> None:
    put_job(stub, active=1, ready=1)
    deep, copied = job(uid="deep", active=1, ready=1), job(uid="copied", active=1, ready=1)
    for name, item in (("infl-deep", deep), ("infl-copied", copied)):
        item["metadata"]["labels"]["infl/run"] = name
        stub.put(f"{JOBS}/{name}", item)
    (variable,) = [
        entry for entry in deep["spec"]["template"]["spec"]["containers"][0]["env"]
        if entry["name"] == "INFL_RUN_JSON"
    ]  # fmt: skip
    variable["value"] = "[" * 60_000
    found = backend.list()
    assert {run: facts.document for run, facts in found.items()} == {
        RUN: lab_run(), "infl-deep": None, "infl-copied": None,
    }  # fmt: skip
    for name in ("infl-deep", "infl-copied"):
        with pytest.raises(BackendError, match=f"Job lab/{name}"):
            backend.document(name)


@pytest.mark.parametrize("wrong_by_s", [-3600, 3600])
def test_a_wrong_clock_here_makes_no_lost_node(
    backend: KubernetesBackend, stub: KubernetesStub, monkeypatch: pytest.MonkeyPatch, wrong_by_s: int
) -> None:
    put_job(stub, active=1, terminating=1)
    item = pod("stopping", job_uid=f"job-{RUN}")
    by_s = time.time()
    item["metadata"]["deletionTimestamp"] = datetime.fromtimestamp(by_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    stub.put(f"{PODS}/stopping", item)
    clock = SimpleNamespace(time=lambda: by_s + wrong_by_s)
    monkeypatch.setattr(server_clock, "time", clock)
    assert backend.get(RUN).phase is backend.list()[RUN].phase is Phase.BACKING_OFF
    before = "2026-02-21T11:00:00Z"  # long gone, whatever the clock here says
    item["metadata"]["deletionTimestamp"] = before
    assert backend.get(RUN).phase is Phase.STUCK


def test_a_server_clock_takes_nothing_from_a_date_that_is_none() -> None:
    clock = server_clock.ServerClock()
    clock.read("Sat, 21 Feb 2026 11:00:00 GMT")
    told_s = datetime(2026, 2, 21, 11, tzinfo=UTC).timestamp()
    for nonsense in (None, "", "tomorrow", "Sat, 99 Feb 2026 11:00:00 GMT"):
        clock.read(nonsense)
    assert 0 <= clock.now_s() - told_s < 3600


@pytest.mark.parametrize("code", [401, 403])
def test_a_refusal_after_an_answer_is_no_answer_for_a_minute(
    backend: KubernetesBackend, stub: KubernetesStub, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A server that was restarted refuses until it knows its roles again."""
    clock = [1000.0]
    give_own_time(monkeypatch, server_backend, monotonic=lambda: clock[0])
    put_job(stub, active=1, ready=1)

    def refuse(times: int = 1) -> None:
        words = 'jobs.batch is forbidden: User "ada" cannot list: role "infl-launcher" not found'
        stub.fail("GET", "/jobs$", status=code, body=status(code, "Forbidden", words), times=times)

    refuse()
    with pytest.raises(ApiForbidden):  # nothing was answered yet: the right is missing
        backend.get(RUN)
    assert backend.get(RUN).phase is Phase.EXECUTING
    refuse(times=2)
    assert backend.get(RUN).phase is Phase.UNREACHABLE
    clock[0] += server_backend.REFUSALS_PASS_S - 1
    facts = backend.get(RUN)
    assert facts.phase is Phase.UNREACHABLE and "does not" in facts.reason
    assert backend.get(RUN).phase is Phase.EXECUTING
    clock[0] += server_backend.REFUSALS_PASS_S
    refuse(times=2)
    assert backend.get(RUN).phase is Phase.UNREACHABLE  # counted anew
    clock[0] += server_backend.REFUSALS_PASS_S
    with pytest.raises(ApiForbidden):
        backend.get(RUN)


def test_all_runs_are_two_questions(backend: KubernetesBackend, stub: KubernetesStub) -> None:
    for number in range(20):
        item = job(lab_run(), uid=f"j{number}", active=1, ready=1)
        item["metadata"]["labels"]["infl/run"] = f"infl-{number}"
        stub.put(f"{JOBS}/infl-{number}", item)
    submitter = job(lab_run(), uid="ray", active=1)
    submitter["metadata"] |= {"ownerReferences": [{"kind": "RayJob", "name": "x", "controller": True}]}
    stub.put(f"{JOBS}/{RUN}", submitter)
    assert {facts.phase for facts in backend.list().values()} == {Phase.EXECUTING}
    assert len(backend.list()) == 20
    assert asked(stub) == ["GET jobs", "GET pods"] * 2
    stub.requests.clear()
    stub.objects[f"{JOBS}/infl-3"]["status"] = {"active": 1, "ready": 0}
    assert backend.list()["infl-3"].phase is Phase.QUEUED
    assert asked(stub) == ["GET jobs", "GET pods"]


def test_the_newest_generation_speaks_and_the_others_are_history(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_job(stub, failed=1, conditions=[condition("Failed", "PodFailurePolicy", "exit code 78 matching")])
    put_job(stub, name=f"{RUN}-r2", active=1, ready=0)
    put_pod(stub, "old", "Failed", exit_code=78, at="2026-02-21T10:00:00Z")
    put_pod(stub, "new", of=f"{RUN}-r2")
    assert backend.get(RUN).phase is Phase.EXECUTING
    assert backend.get(RUN).num_attempts == 2
    first, second = backend.history(RUN)
    assert (first.number, first.pod, first.verdict) == (1, "old", Verdict.FATAL)
    assert "configuration error (78)" in str(first.decision)
    assert (second.number, second.pod, second.verdict) == (2, "new", None)


def test_a_question_that_fails_is_unreachable_and_never_failed(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_job(stub, active=1, ready=1)
    stub.fail("GET", "/jobs$", status=500, times=MAX_TRIES)
    facts = backend.get(RUN)
    assert facts.phase is Phase.UNREACHABLE
    assert "failed (HTTP 500)" in facts.reason
    stub.stop()
    assert backend.get(RUN).phase is Phase.UNREACHABLE
    with pytest.raises(BackendError, match="cannot be reached"):
        backend.list()


def test_a_missing_right_is_an_error_since_no_poll_cures_it(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_job(stub, active=1)
    stub.fail("GET", "/pods$", status=403, body=status(403, "Forbidden", 'cannot list resource "pods"'))
    with pytest.raises(ApiForbidden) as caught:
        backend.get(RUN)
    assert "'list' on 'pods' in namespace 'lab'" in str(caught.value.why)


def test_a_quota_is_told_from_the_job_controllers_event(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_job(stub)
    at, about = (
        "2026-02-21T11:05:00Z",
        {"kind": "Job", "uid": stub.objects[f"{JOBS}/{RUN}"]["metadata"]["uid"]},
    )
    put_event(stub, "e1", "Job", RUN, "FailedCreate", "exceeded quota: gpus", at=at, involvedObject=about)
    facts = backend.get(RUN)
    assert (facts.phase, facts.reason) == (Phase.QUEUED, "no pod can be created: exceeded quota: gpus")
    stub.fail("GET", "/events$", status=403, body=status(403, "Forbidden", "no"))
    assert backend.get(RUN).reason == "the Job controller has not started a pod yet"
    put_pod(stub, "a", "Failed", exit_code=3, at="2026-02-21T11:10:00Z")  # one could be created since
    assert backend.get(RUN).phase is Phase.BACKING_OFF


def test_a_list_says_why_no_pod_can_be_created_as_the_run_itself_does(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    uid = str(put_job(stub)["metadata"]["uid"])
    words = (
        'pods "a" is forbidden: error looking up service account lab/nope: serviceaccount "nope" not found'
    )
    about = {"kind": "Job", "name": RUN, "uid": uid}
    put_event(stub, "e1", "Job", RUN, "FailedCreate", words, at="2026-02-21T11:05:00Z", involvedObject=about)
    alone, listed = backend.get(RUN), backend.list()[RUN]
    assert (alone.phase, alone.reason) == (Phase.STUCK, f"no pod can be created: {words}")
    assert (listed.phase, listed.reason, listed.next_step) == (alone.phase, alone.reason, alone.next_step)
    assert asked(stub)[-3:] == ["GET jobs", "GET pods", "GET events"]
    assert stub.requests[-1].query["fieldSelector"] == "involvedObject.kind=Job,reason=FailedCreate"
    stub.fail("GET", "/events$", status=403, body=status(403, "Forbidden", "no"))
    assert backend.list()[RUN].phase is Phase.QUEUED


def put_event(
    stub: KubernetesStub, name: str, kind: str, about: str, reason: str, message: str, *, at: str, **more: Any
) -> None:
    item = {
        "involvedObject": {"kind": kind, "name": about}, "reason": reason, "message": message,
        "lastTimestamp": at, "type": "Normal", **more,
    }  # fmt: skip
    stub.put(f"{EVENTS}/{name}", item)


def test_a_damaged_document_does_not_hide_the_run(backend: KubernetesBackend, stub: KubernetesStub) -> None:
    item = put_job(stub, active=1, ready=1)
    item["spec"]["template"]["spec"]["containers"][0]["env"] = []
    facts = backend.get(RUN)
    assert (facts.phase, facts.document) == (Phase.EXECUTING, None)
    assert RUN in backend.list()
    with pytest.raises(BackendError, match="is no run"):
        backend.document(RUN)


# -- orders


def test_cancel_sets_a_deadline_and_waits_for_the_end(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_job(stub, active=1, ready=1)

    def controller(request: Any) -> None:
        if request.query.get("watch"):
            ended = {**stub.objects[f"{JOBS}/{RUN}"]}
            ended["status"] = {"conditions": [condition("Failed", "DeadlineExceeded")]}
            stub.put(f"{JOBS}/{RUN}", ended)

    stub.on_request = controller
    facts = backend.cancel(RUN, timeout_s=20)
    assert facts.phase is Phase.CANCELLED
    item = stub.objects[f"{JOBS}/{RUN}"]
    assert item["spec"]["activeDeadlineSeconds"] == 1
    assert item["metadata"]["annotations"]["infl/cancelled-at"]
    assert stub.count("DELETE", "") == 0
    stub.requests.clear()
    assert backend.cancel(RUN).phase is Phase.CANCELLED
    assert stub.count("PATCH", "") == 0
    assert len([r for r in stub.requests if r.query.get("watch")]) == 0


def test_a_cancel_that_takes_too_long_says_how_far_it_is(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_job(stub, active=1, ready=1)
    assert backend.cancel(RUN, timeout_s=0.1).phase is Phase.STOPPING
    assert backend.cancel(RUN, timeout_s=0).phase is Phase.STOPPING


def test_suspend_and_resume_turn_the_jobs_own_switch(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_job(stub)
    facts = backend.suspend(RUN, timeout_s=5)
    assert facts.phase is Phase.SUSPENDED
    assert stub.objects[f"{JOBS}/{RUN}"]["spec"]["suspend"] is True
    assert backend.resume(RUN).phase is Phase.QUEUED
    item = stub.objects[f"{JOBS}/{RUN}"]
    assert item["spec"]["suspend"] is False
    assert "infl/suspended-at" not in item["metadata"]["annotations"]
    stub.requests.clear()
    backend.resume(RUN)
    assert stub.count("PATCH", "") == 0


def put_kueue_job(stub: KubernetesStub, **workload: Any) -> None:
    stub.put(f"{JOBS}/{RUN}", job(lab_run(*KUEUE), uid="k1"))
    labels = {"kueue.x-k8s.io/job-uid": "k1"}
    stub.put(f"{WORKLOADS}/job-{RUN}-12345", {"metadata": {"labels": labels}, "spec": {}, **workload})


def test_kueue_owns_the_switch_of_its_jobs(backend: KubernetesBackend, stub: KubernetesStub) -> None:
    put_kueue_job(stub)
    assert backend.suspend(RUN, timeout_s=5).phase is Phase.SUSPENDED
    workload = stub.objects[f"{WORKLOADS}/job-{RUN}-12345"]
    assert workload["spec"]["active"] is False
    assert "suspend" not in next(r for r in stub.requests if r.method == "PATCH" and "jobs" in r.path).body
    assert backend.resume(RUN).phase is Phase.QUEUED
    assert stub.objects[f"{WORKLOADS}/job-{RUN}-12345"]["spec"]["active"] is True
    assert backend.cancel(RUN, timeout_s=5).phase is Phase.CANCELLED
    assert stub.objects[f"{WORKLOADS}/job-{RUN}-12345"]["spec"]["active"] is False


@pytest.mark.parametrize("lost", ["jobs", "workloads"])
def test_a_suspend_that_ended_between_its_two_changes_can_be_resumed_or_repeated(
    backend: KubernetesBackend, stub: KubernetesStub, lost: str
) -> None:
    put_kueue_job(stub)
    for order in ("resume", "suspend"):
        no = f'User "ada" cannot patch resource "{lost}"'
        stub.fail("PATCH", f"/{lost}/", status=403, body=status(403, "Forbidden", no))
        with pytest.raises(ApiForbidden):
            backend.suspend(RUN, timeout_s=5)
        workload = stub.objects[f"{WORKLOADS}/job-{RUN}-12345"]
        assert workload["spec"].get("active") is not False  # nothing is held back without a note
        if order == "suspend":
            assert backend.suspend(RUN, timeout_s=5).phase is Phase.SUSPENDED
        assert backend.resume(RUN).phase is Phase.QUEUED


def test_a_workload_that_was_deactivated_without_a_note_can_be_resumed(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_kueue_job(stub, spec={"active": False})
    assert "its Workload is deactivated, until the run is resumed" in backend.get(RUN).reason
    assert backend.resume(RUN).phase is Phase.QUEUED
    assert stub.objects[f"{WORKLOADS}/job-{RUN}-12345"]["spec"]["active"] is True


def test_kueues_words_are_shown(backend: KubernetesBackend, stub: KubernetesStub) -> None:
    reserved = condition("QuotaReserved", "Pending", "insufficient unused quota for nvidia.com/gpu", "False")
    evicted = condition("Evicted", "Preempted", "by a workload of higher priority")
    put_kueue_job(stub, status={"conditions": [reserved, evicted]})
    facts = backend.get(RUN)
    assert facts.phase is Phase.QUEUED
    assert facts.reason == (
        "waits for Kueue's queue 'research': evicted (Preempted): by a workload of higher priority; "
        "insufficient unused quota for nvidia.com/gpu"
    )
    stub.fail("GET", "/workloads$", status=403, body=status(403, "Forbidden", "no"))
    assert backend.get(RUN).reason == "waits for Kueue's queue 'research'"


# -- logs, history, events


def lines(*numbers: int) -> list[tuple[str, str]]:
    return [(f"2026-02-21T11:00:{n:02d}.000000001Z", f"line {n}") for n in numbers]


def read_all(backend: KubernetesBackend, attempt: int, text: bytes = b"") -> bytes:
    while piece := backend.read_log(RUN, attempt, len(text)):
        text += piece
    return text


def test_logs_come_from_the_pods_in_order_of_creation(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_job(stub, active=1, ready=1)
    put_pod(stub, "z", "Failed", exit_code=3, at="2026-02-21T10:00:00Z")
    put_pod(stub, "a", at="2026-02-21T11:00:00Z")
    put_pod(stub, "not-started", "Pending", at="2026-02-21T11:30:00Z")
    stub.logs |= {"z": lines(1, 2), "a": lines(3)}
    assert backend.attempts(RUN) == [1, 2]
    assert read_all(backend, 1) == b"line 1\nline 2\n"
    assert read_all(backend, 2) == b"line 3\n"
    assert backend.read_log(RUN, 7, 0) == b""
    assert read_all(backend, 1) == b"line 1\nline 2\n", "from the beginning again"


def test_a_log_is_followed_over_a_restart_of_the_server(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_job(stub, active=1, ready=1)
    put_pod(stub, "a")
    stub.logs["a"] = lines(0)
    stub.cut_log_after_bytes = 10
    assert backend.attempts(RUN) == [1]
    text = read_all(backend, 1)
    assert text == b"line 0\n"
    for number in range(1, 9):
        stub.logs["a"] += lines(number)
        if number == 4:
            stub.stop()
            assert backend.attempts(RUN) == [1], "what was known before"
            stub.start()
        text = read_all(backend, 1, text)
    put_pod(stub, "a", "Succeeded", exit_code=0)
    stub.ended_logs.add("a")
    backend.attempts(RUN)
    assert read_all(backend, 1, text) == b"".join(b"line %d\n" % n for n in range(9))


def test_a_pod_that_is_gone_lends_its_number_to_none(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_job(stub, active=1, ready=1)
    put_pod(stub, "a", at="2026-02-21T10:00:00Z")
    stub.logs |= {"a": lines(1), "b": lines(2)}
    assert backend.attempts(RUN) == [1]
    stub.remove(f"{PODS}/a")
    put_pod(stub, "b", at="2026-02-21T11:00:00Z")
    assert backend.attempts(RUN) == [2]
    assert read_all(backend, 2) == b"line 2\n"


def test_a_run_directory_that_is_readable_here_goes_before_the_pods(
    stub: KubernetesStub, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    backend = KubernetesBackend(stub.profile(tmp_path, root=root))
    put_job(stub, active=1, ready=1)
    put_pod(stub, "a")
    stub.logs["a"] = lines(0)
    assert backend.attempts(RUN) == [1]
    assert read_all(backend, 1) == b"line 0\n", "there is no directory yet"
    paths = RunPaths.of(root, RUN)
    create_run(paths, lab_run())
    for name in ("gone", "a"):
        attempt = claim_attempt(paths, pod=name)
        paths.log(attempt.number).write_text(f"log of {name}\n")
    backend = KubernetesBackend(stub.profile(tmp_path, root=root))
    stub.requests.clear()
    assert backend.attempts(RUN) == [1, 2]
    assert read_all(backend, 2) == b"log of a\n"
    assert stub.requests == []
    assert [(a.pod, a.number) for a in backend.history(RUN)] == [("a", 2)]


def test_a_log_that_is_followed_loses_no_pod_when_the_trainer_begins_to_claim(
    stub: KubernetesStub, tmp_path: Path
) -> None:
    """The first pod died before it claimed a number, so the second one's attempt is the first."""
    root = tmp_path / "runs"
    backend = KubernetesBackend(stub.profile(tmp_path, root=root))
    put_job(stub, active=1)
    put_pod(stub, "early", "Failed", exit_code=1, at="2026-02-21T10:00:00Z")
    stub.logs["early"] = lines(1, 2, 3)
    stub.ended_logs.add("early")
    assert backend.attempts(RUN) == [1]
    text = read_all(backend, 1)
    assert text == b"line 1\nline 2\nline 3\n"
    put_pod(stub, "later")
    stub.logs["later"] = lines(4)
    paths = RunPaths.of(root, RUN)
    create_run(paths, lab_run())
    paths.log(claim_attempt(paths, pod="later").number).write_text("line 4\n")
    assert backend.attempts(RUN) == [1, 2]
    assert read_all(backend, 1, text) == text
    assert read_all(backend, 2) == b"line 4\n"


def test_the_last_lines_of_a_pod_that_is_deleted_are_read(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_job(stub, active=1, ready=1)
    put_pod(stub, "a", at="2026-02-21T10:00:00Z")
    stub.logs["a"] = lines(0)
    assert backend.attempts(RUN) == [1]
    text = read_all(backend, 1)
    stub.logs["a"] += lines(1)
    while not text.endswith(b"line 1\n"):  # its log is followed from here on
        text = read_all(backend, 1, text)
    stub.logs["a"] += lines(*range(2, 51))
    stub.ended_logs.add("a")
    stub.remove(f"{PODS}/a")
    put_pod(stub, "b", at="2026-02-21T11:00:00Z")
    del stub.logs["a"]
    assert backend.attempts(RUN) == [1, 2]
    assert read_all(backend, 1, text) == b"".join(b"line %d\n" % n for n in range(51))


def test_a_torn_record_makes_no_other_pods_number(stub: KubernetesStub, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    backend = KubernetesBackend(stub.profile(tmp_path, root=root))
    put_job(stub, active=1, ready=1)
    for hour, name in enumerate(("early", "first", "second"), start=10):
        put_pod(stub, name, "Failed", exit_code=3, at=f"2026-02-21T{hour}:00:00Z")
    paths = RunPaths.of(root, RUN)
    create_run(paths, lab_run())
    claim_attempt(paths, pod="first")
    claim_attempt(paths, pod="second")
    paths.attempt(1).write_text("{")
    assert [(a.pod, a.number) for a in backend.history(RUN)] == [
        ("early", None), ("first", None), ("second", 2),
    ]  # fmt: skip


def test_events_are_those_of_the_runs_objects_the_oldest_first(
    backend: KubernetesBackend, stub: KubernetesStub
) -> None:
    put_job(stub, active=1)
    at = "2026-02-21T11:0{}:00Z"
    put_event(stub, "1", "Pod", f"{RUN}-x7k2p", "Scheduled", "to gpu-3", at=at.format(2))
    put_event(stub, "2", "Job", RUN, "SuccessfulCreate", f"Created pod: {RUN}-x7k2p", at=at.format(1))
    put_event(stub, "3", "Workload", f"job-{RUN}-abcde", "Admitted", "yes", at=at.format(0), count=3)
    for number, (kind, name) in enumerate(
        [("Job", f"{RUN}-r2"), ("Pod", f"{RUN}-other-x7k2p"), ("Pod", f"x-{RUN}-x7k2p"), ("Pod", RUN)]
    ):
        put_event(stub, f"foreign{number}", kind, name, "Scheduled", "", at=at.format(3))
    events = backend.events(RUN)
    assert [(e.about, e.reason, e.count) for e in events] == [
        (f"Workload job-{RUN}-abcde", "Admitted", 3),
        (f"Job {RUN}", "SuccessfulCreate", 1),
        (f"Pod {RUN}-x7k2p", "Scheduled", 1),
    ]


def test_a_pod_that_is_gone_is_told_from_its_events(backend: KubernetesBackend, stub: KubernetesStub) -> None:
    put_job(stub, active=1, ready=1)
    at = "2026-02-21T11:0{}:00Z"
    first, second = f"{RUN}-aaaaa", f"{RUN}-bbbbb"
    put_event(stub, "1", "Job", RUN, "SuccessfulCreate", f"Created pod: {first}", at=at.format(0))
    put_event(stub, "2", "Pod", first, "Preempted", "Preempted by pod x on node gpu-3", at=at.format(3))
    put_event(stub, "3", "Job", RUN, "SuccessfulCreate", f"Created pod: {second}", at=at.format(4))
    put_pod(stub, second, at=at.format(4))
    gone, there = backend.history(RUN)
    assert (gone.pod, gone.number, gone.verdict, gone.decision) == (
        first,
        1,
        Verdict.FREE_RETRY,
        "not charged",
    )
    assert gone.ended_by == "preempted: Preempted by pod x on node gpu-3"
    assert (gone.started_at, gone.ended_at) == (at.format(0), at.format(3))
    assert (there.pod, there.number, there.ended_by) == (second, 2, None)
    stub.logs[second] = lines(7)
    assert backend.attempts(RUN) == [2], "the same number, whoever is asked"
    assert (read_all(backend, 1), read_all(backend, 2)) == (b"", b"line 7\n")
    stub.fail("GET", "/events$", status=403, body=status(403, "Forbidden", "no"), times=2)
    (alone,) = backend.history(RUN)
    assert alone.number == 1, "nobody tells of the other"


CANCELLED, SUSPENDED = {"infl/cancelled-at": "now"}, {"infl/suspended-at": "now"}
PAST_ITS_DEADLINE = {"conditions": [condition("Failed", "DeadlineExceeded", "Job was active longer")]}


@pytest.mark.parametrize(
    ("annotations", "suspend", "status", "sets", "ended_by", "decision"),
    [
        (CANCELLED, False, PAST_ITS_DEADLINE, (), "stopped: the run was cancelled",
         "not started again: cancelled"),
        ({}, False, PAST_ITS_DEADLINE, (),
         "stopped: the deadline of the whole run, 604800 s, has passed (retry.deadline_s)",
         "not started again: the deadline of the whole run, 604800 s, has passed (retry.deadline_s)"),
        (SUSPENDED, True, {}, (), "stopped: the run was suspended",
         "not started again before the run is resumed"),
        (CANCELLED, True, {}, (), "stopped: the run was suspended", "not started again: cancelled"),
        ({}, True, {}, KUEUE, "stopped: Kueue's queue 'research' took the machines back",
         "not started again before the run is resumed"),
    ],
)  # fmt: skip
def test_who_stopped_a_pod_that_is_gone_is_told(
    backend: KubernetesBackend,
    stub: KubernetesStub,
    annotations: dict[str, str],
    suspend: bool,
    status: dict[str, Any],
    sets: tuple[str, ...],
    ended_by: str,
    decision: str,
) -> None:
    item = job(lab_run(*sets), **status)
    item["metadata"]["annotations"] |= annotations
    item["spec"]["suspend"] = suspend
    stub.put(f"{JOBS}/{RUN}", item)
    at = "2026-02-21T11:0{}:00Z"
    first, second = f"{RUN}-aaaaa", f"{RUN}-bbbbb"
    put_event(stub, "1", "Job", RUN, "SuccessfulCreate", f"Created pod: {first}", at=at.format(0))
    put_event(stub, "2", "Job", RUN, "SuccessfulDelete", f"Deleted pod: {first}", at=at.format(1))
    put_event(stub, "3", "Job", RUN, "SuccessfulCreate", f"Created pod: {second}", at=at.format(2))
    put_event(stub, "4", "Job", RUN, "SuccessfulDelete", f"Deleted pod: {second}", at=at.format(3))
    earlier, newest = backend.history(RUN)
    assert (newest.ended_by, newest.decision) == (ended_by, decision)
    assert (earlier.ended_by, earlier.decision) == (
        "stopped: the run was suspended",
        "started again, not charged",
    ), "a Job that has ended gets no other pod"


def test_the_deadline_of_a_cancel_is_no_warning(backend: KubernetesBackend, stub: KubernetesStub) -> None:
    item = put_job(stub, **PAST_ITS_DEADLINE)
    at, words = "2026-02-21T11:00:00Z", "Job was active longer than specified deadline"
    put_event(stub, "1", "Job", RUN, "DeadlineExceeded", words, at=at, type="Warning")
    (missed,) = backend.events(RUN)
    assert (missed.warning, missed.message) == (True, words)
    item["metadata"]["annotations"] |= CANCELLED
    (cancelled,) = backend.events(RUN)
    assert not cancelled.warning and cancelled.message.startswith("by `launcher cancel`")


# -- what must never be seen


def test_no_token_in_anything_that_is_printed(stub: KubernetesStub, tmp_path: Path) -> None:
    """Also not in the traceback of an error that nobody caught, nor in a debugger's view of the objects."""
    profile = stub.profile(tmp_path)
    backend = KubernetesBackend(profile)
    put_job(stub, active=1)
    stub.fail("GET", "/pods$", status=401, body=status(401, "Unauthorized", "Unauthorized"))
    script = (
        "from pathlib import Path; from launcher.backends import open_backend\n"
        "from launcher.profiles import Profile\n"
        f"path = Path({str(profile.kubeconfig)!r})\n"
        "b = open_backend(Profile(name='lab', backend='kubernetes', kubeconfig=path, namespace='lab'))\n"
        f"print(b, vars(b), vars(b._reader.api), b.get({RUN!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "does not accept your credentials" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    assert TOKEN not in repr([backend.list(), backend.get(RUN), backend.history(RUN)])
