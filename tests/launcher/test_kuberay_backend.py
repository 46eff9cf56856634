"""The backend kuberay over a stub of the API server: orders, questions counted, the story, and doctor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from influence.rundir import ConflictError
from influence.rundir.exits import Verdict
from launcher import errors
from launcher.backends import kubernetes_api, kubernetes_orders, pod_log
from launcher.backends.kuberay import KuberayBackend
from launcher.backends.kuberay_checks import checks
from launcher.backends.kubernetes_errors import ApiNotFound
from launcher.doctor import Check
from launcher.errors import BackendError
from launcher.states import Phase
from tests.launcher.kuberay_objects import (
    AT,
    RAYJOBS,
    RUN,
    failed_with,
    of_operator,
    ray_pod,
    rayjob,
    two_node_run,
)
from tests.launcher.kubernetes_objects import EVENTS, JOBS, PODS
from tests.launcher.kubernetes_stub import KubernetesStub, running_stub, status

CLUSTER = f"{RUN}-x7k2p"


@pytest.fixture
def stub() -> Iterator[KubernetesStub]:
    with running_stub() as stub:
        yield stub


@pytest.fixture
def backend(stub: KubernetesStub, tmp_path: Path) -> KuberayBackend:
    return KuberayBackend(stub.profile(tmp_path, backend="kuberay"))


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_api, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(kubernetes_orders, "_POLL_S", 0.01)
    monkeypatch.setattr(pod_log, "_RECONNECT_S", 0.01)


def put(stub: KubernetesStub, name: str = RUN, **status: Any) -> dict[str, Any]:
    return stub.put(f"{RAYJOBS}/{name}", rayjob(name=name, **status))


def put_pods(stub: KubernetesStub, cluster: str = CLUSTER, **status: Any) -> None:
    for pod in (ray_pod(cluster, **status), ray_pod(cluster, worker=True, **status)):
        stub.put(f"{PODS}/{pod['metadata']['name']}", pod)


def asked(stub: KubernetesStub) -> list[str]:
    return [f"{r.method} {r.path.rpartition('/')[2]}" for r in stub.requests]


def patches(stub: KubernetesStub) -> list[Any]:
    return [r.body for r in stub.requests if r.method == "PATCH"]


# -- submit


def test_a_new_run_is_one_rayjob(backend: KuberayBackend, stub: KubernetesStub) -> None:
    run = two_node_run()
    assert backend.submit(run) is True
    assert asked(stub) == ["GET rayjobs", "GET pods", "GET jobs", "POST rayjobs"]
    assert backend.document(RUN) == run
    assert backend.submit(run) is False
    assert stub.count("POST", "/rayjobs$") == 1


def test_another_spec_is_a_conflict(backend: KuberayBackend, stub: KubernetesStub) -> None:
    backend.submit(two_node_run())
    with pytest.raises(ConflictError) as caught:
        backend.submit(two_node_run("training.seed=7"))
    assert "training.seed: 0 -> 7" in caught.value.difference
    assert f"RayJob lab/{RUN}" in str(caught.value)


def test_a_run_that_ended_starts_its_next_generation(backend: KuberayBackend, stub: KubernetesStub) -> None:
    put(stub, deployment="Failed", job="FAILED", failed=5, message=failed_with(1), endTime=AT)
    put_pods(stub)
    with pytest.raises(BackendError, match=r"cannot be started again yet: pod \S+ on node gpu-0 is"):
        backend.submit(two_node_run())
    for name in [path for path in stub.objects if path.startswith(PODS)]:
        stub.remove(name)
    assert backend.submit(two_node_run()) is True
    assert sorted(p.rpartition("/")[2] for p in stub.objects) == [RUN, f"{RUN}-r2"]


def test_a_lost_answer_makes_no_second_rayjob(backend: KuberayBackend, stub: KubernetesStub) -> None:
    stub.fail("POST", "/rayjobs$", status=502, carried_out=True)
    assert backend.submit(two_node_run()) is True
    assert stub.count("POST", "/rayjobs$") == 1


def test_what_is_refused_before_anything_is_asked(backend: KuberayBackend) -> None:
    assert backend.refusal(two_node_run()) is None
    pools = backend.refusal(two_node_run("cluster.node_pools=[h200]"))
    assert pools is not None and "node pools" in pools.lacking[0]
    digit = backend.refusal(replace(two_node_run(), run="2fast"))
    assert digit is not None and "begins with a letter" in digit.lacking[0]


# -- get and list


def test_a_run_that_nobody_knows_is_absent(backend: KuberayBackend, stub: KubernetesStub) -> None:
    assert backend.get(RUN).phase is Phase.ABSENT
    assert backend.document(RUN) is None


def test_a_cluster_without_kuberay_says_so(backend: KuberayBackend, stub: KubernetesStub) -> None:
    for ask in (lambda: backend.get(RUN), backend.list, lambda: backend.submit(two_node_run())):
        stub.fail("GET", "/rayjobs$", status=404, body=status(404, "NotFound", "no such resource"))
        with pytest.raises(ApiNotFound, match="KubeRay is not installed") as caught:
            ask()
        assert "--backend kubernetes" in str(caught.value.next_step)


def test_a_server_that_is_away_is_unreachable(backend: KuberayBackend, stub: KubernetesStub) -> None:
    stub.stop()
    assert backend.get(RUN).phase is Phase.UNREACHABLE


def test_a_list_is_at_most_two_questions(backend: KuberayBackend, stub: KubernetesStub) -> None:
    put(stub, deployment="Complete", job="SUCCEEDED", endTime=AT)
    assert {run: facts.phase for run, facts in backend.list().items()} == {RUN: Phase.COMPLETED}
    assert asked(stub) == ["GET rayjobs", "GET pods"]
    stub.requests.clear()
    for number in range(3):
        other = two_node_run(f"training.seed={number}")
        name = f"infl-other-{number}"
        item = rayjob(other, name=name, deployment="Running", rayClusterName=f"{name}-x7k2p")
        item["metadata"]["labels"]["infl/run"] = name
        stub.put(f"{RAYJOBS}/{name}", item)
        put_pods(stub, f"{name}-x7k2p")
    assert len(backend.list()) == 4
    assert asked(stub) == ["GET rayjobs", "GET pods"]


def test_the_newest_generation_speaks_and_clusters_of_others_do_not(
    backend: KuberayBackend, stub: KubernetesStub
) -> None:
    put(stub, deployment="Failed", job="FAILED", failed=5, message=failed_with(1), endTime=AT)
    put(stub, f"{RUN}-r2", deployment="Running", rayClusterName=f"{RUN}-r2-aaaaa")
    put_pods(stub, f"{RUN}-r2-aaaaa")
    facts = backend.get(RUN)
    assert (facts.phase, facts.num_charged, facts.num_attempts) == (Phase.EXECUTING, 0, 6)
    assert "gpu-0, gpu-1" in facts.reason
    assert facts.document == two_node_run()


# -- cancel, suspend, resume


def operator(stub: KubernetesStub, name: str = RUN) -> None:
    """KubeRay, as far as it reacts to a deadline and a suspension."""

    def react(request: Any) -> None:
        path = f"{RAYJOBS}/{name}"
        item = stub.objects.get(path)
        if item is None or request.method != "GET":
            return
        spec, state = item["spec"], item["status"].get("jobDeploymentStatus")
        if state in ("Running", "Initializing"):
            if spec.get("suspend"):
                stub.put(path, item | {"status": of_operator("Suspended")})
            elif spec["activeDeadlineSeconds"] == 1:
                failed = of_operator("Failed", reason="DeadlineExceeded", failed=1, endTime=AT)
                stub.put(path, item | {"status": failed})
            else:
                return
            for pod in [p for p in stub.objects if p.startswith(PODS)]:
                stub.remove(pod)
        elif state == "Suspended" and not spec.get("suspend"):
            stub.put(path, item | {"status": of_operator("Initializing")})

    stub.on_request = react


def test_cancel_ends_the_rayjob_and_its_cluster_without_deleting(
    backend: KuberayBackend, stub: KubernetesStub
) -> None:
    put(stub, deployment="Running", rayClusterName=CLUSTER)
    put_pods(stub)
    operator(stub)
    assert backend.cancel(RUN, timeout_s=5).phase is Phase.CANCELLED
    (change,) = patches(stub)
    assert change["spec"] == {"activeDeadlineSeconds": 1, "ttlSecondsAfterFinished": 0}
    assert "infl/cancelled-at" in change["metadata"]["annotations"]
    assert backend.cancel(RUN, timeout_s=5).phase is Phase.CANCELLED
    assert stub.count("DELETE", "") == 0
    assert backend.submit(two_node_run()) is True, "a cancelled run goes on as its next generation"


def test_cancel_gives_up_waiting_but_not_the_order(backend: KuberayBackend, stub: KubernetesStub) -> None:
    put(stub, deployment="Running", rayClusterName=CLUSTER)
    put_pods(stub)
    assert backend.cancel(RUN, timeout_s=0.2).phase is Phase.STOPPING
    with pytest.raises(BackendError, match="is being cancelled"):
        backend.submit(two_node_run())


def test_suspend_and_resume(backend: KuberayBackend, stub: KubernetesStub) -> None:
    put(stub, deployment="Running", rayClusterName=CLUSTER)
    operator(stub)
    assert backend.suspend(RUN, timeout_s=5).phase is Phase.SUSPENDED
    assert patches(stub)[-1]["spec"] == {"suspend": True}
    backend.resume(RUN)
    assert patches(stub)[-1]["spec"] == {"suspend": False}
    assert backend.get(RUN).phase is Phase.QUEUED


# -- the story


def test_the_log_is_that_of_the_heads_container(backend: KuberayBackend, stub: KubernetesStub) -> None:
    put(stub, deployment="Running", rayClusterName=CLUSTER)
    put_pods(stub)
    head = f"{CLUSTER}-head-fghij"
    stub.logs[head] = [(f"{AT[:-1]}.000000001Z", "influence.train: attempt 1")]
    stub.ended_logs.add(head)
    assert list(backend.attempts(RUN)) == [1], "a worker is no attempt"
    assert backend.read_log(RUN, 1, 0) == b"influence.train: attempt 1\n"
    (log,) = [r for r in stub.requests if r.path.endswith("/log") and r.query.get("follow") != "true"]
    assert (log.path.split("/")[-2], log.query["container"]) == (head, "trainer")


def put_event(stub: KubernetesStub, number: int, kind: str, name: str, reason: str, message: str) -> None:
    stub.put(f"{EVENTS}/event-{number}", {
        "involvedObject": {"kind": kind, "name": name}, "reason": reason, "message": message,
        "type": "Normal", "lastTimestamp": f"2026-02-21T11:0{number}:00Z",
    })  # fmt: skip


def test_history_tells_of_clusters_that_are_gone(backend: KuberayBackend, stub: KubernetesStub) -> None:
    put(
        stub, deployment="Failed", job="FAILED", reason="AppFailed", failed=5,
        rayClusterName=CLUSTER, endTime=AT, message=failed_with(78, "influence.train: no GPU here"),
    )  # fmt: skip
    put_pods(stub)
    gone = f"{RUN}-aaaaa"
    put_event(stub, 0, "RayJob", RUN, "CreatedRayCluster", f"Created RayCluster lab/{gone}")
    put_event(stub, 1, "RayJob", RUN, "DeletedRayCluster", f"Deleted cluster lab/{gone}")
    put_event(stub, 2, "RayJob", RUN, "CreatedRayCluster", f"Created RayCluster lab/{CLUSTER}")
    first, last = sorted(backend.history(RUN), key=lambda facts: facts.where != f"Ray cluster {gone}")
    assert (first.started_at, first.ended_at) == ("2026-02-21T11:00:00Z", "2026-02-21T11:01:00Z")
    assert last.pod == f"{CLUSTER}-head-fghij"
    assert (last.number, last.exit_code, last.verdict) == (1, 78, Verdict.CHARGED_RETRY)
    assert last.ended_by == "configuration error (78): no GPU here"
    assert last.decision is not None and last.decision.startswith("not started again: all 4 retries")


def test_history_of_a_run_under_way(backend: KuberayBackend, stub: KubernetesStub) -> None:
    put(stub, deployment="Running", rayClusterName=CLUSTER)
    put_pods(stub)
    (now,) = backend.history(RUN)
    assert (now.ended_by, now.ended_at, now.verdict, now.decision) == (None, None, None, None)
    assert "on node gpu-0" in now.where


def test_events_are_those_of_the_run_and_what_was_made_for_it(
    backend: KuberayBackend, stub: KubernetesStub
) -> None:
    put(stub, deployment="Running", rayClusterName=CLUSTER)
    ours = [
        ("RayJob", RUN), ("RayCluster", CLUSTER), ("Pod", f"{CLUSTER}-nodes-worker-abcde"),
        ("Workload", f"rayjob-{RUN}-1a2b3"),
    ]  # fmt: skip
    foreign = [("RayJob", f"{RUN}-more"), ("Pod", "infl-other-x7k2p-head-abcde"), ("Pod", f"{RUN}x-aaaaa")]
    for number, (kind, name) in enumerate([*ours, *foreign]):
        put_event(stub, number, kind, name, "Something", "happened")
    assert [event.about for event in backend.events(RUN)] == [f"{kind} {name}" for kind, name in ours]


# -- doctor


def found(stub: KubernetesStub, tmp_path: Path) -> dict[str, Check]:
    all_checks = list(checks(stub.profile(tmp_path, backend="kuberay"), two_node_run()))
    for check in all_checks:
        assert check.detail and (check.outcome != "failed" or check.next_step), check
    return {check.name: check for check in all_checks}


@pytest.fixture
def site(stub: KubernetesStub) -> KubernetesStub:
    core = "/api/v1/namespaces/lab"
    stub.objects["/version"] = {"gitVersion": "v1.36.2", "major": "1", "minor": "36"}
    stub.objects["/apis/ray.io/v1"] = {"resources": [{"kind": "RayCluster"}, {"kind": "RayJob"}]}
    stub.put(core, {})
    claim = {"spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Bound"}}
    stub.put(f"{core}/persistentvolumeclaims/infl-artifacts", claim)
    stub.put(f"{core}/serviceaccounts/infl-trainer", {})
    stub.put(f"{core}/secrets/infl-secrets", {"data": {"WANDB_API_KEY": "eA=="}})
    for name in ("gpu-0", "gpu-1"):
        stub.put(f"/api/v1/nodes/{name}", {
            "metadata": {"labels": {"nvidia.com/gpu.product": "NVIDIA-H200"}}, "spec": {},
            "status": {
                "allocatable": {"nvidia.com/gpu": "8"}, "conditions": [{"type": "Ready", "status": "True"}],
            },
        })  # fmt: skip
    put(stub, "infl-earlier", deployment="Complete", job="SUCCEEDED")
    return stub


def test_a_good_cluster_passes_every_check(site: KubernetesStub, tmp_path: Path) -> None:
    by_name = found(site, tmp_path)
    assert {name: check.detail for name, check in by_name.items() if check.outcome != "ok"} == {}
    assert "right on rayjobs.ray.io" in by_name
    assert "infl-earlier" in by_name["KubeRay's operator"].detail
    dry = [r for r in site.requests if r.path == RAYJOBS and r.method == "POST"]
    assert [r.query for r in dry] == [{"dryRun": "All", "fieldValidation": "Strict"}]


def test_a_cluster_without_kuberay_fails_there(site: KubernetesStub, tmp_path: Path) -> None:
    del site.objects["/apis/ray.io/v1"]
    site.fail("GET", "^/apis/ray.io/v1$", status=404, body=status(404, "NotFound", "not found"))
    by_name = found(site, tmp_path)
    assert by_name["KubeRay"].outcome == "failed"
    assert list(by_name) == ["API server", "KubeRay"]


def test_the_charts_option_is_named_to_who_has_all_other_rights(site: KubernetesStub, tmp_path: Path) -> None:
    no = {"kind": "SelfSubjectAccessReview", "metadata": {}, "status": {"allowed": False}}
    site.fail("POST", "selfsubjectaccessreviews$", status=201, body=no, times=5)
    denied = 'User "ada" cannot list resource "rayjobs"'
    site.fail("GET", "/rayjobs$", status=403, body=status(403, "Forbidden", denied))
    by_name = found(site, tmp_path)
    assert by_name["right on rayjobs.ray.io"].outcome == "failed"
    for name in ("right on rayjobs.ray.io", "KubeRay's operator"):
        assert "kuberay.enabled=true" in str(by_name[name].next_step)


def test_an_old_kuberay_and_an_operator_that_sleeps(site: KubernetesStub, tmp_path: Path) -> None:
    put(site, "infl-ignored")
    unknown = 'strict decoding error: unknown field "spec.preRunningDeadlineSeconds"'
    site.fail("POST", "/rayjobs$", status=400, body=status(400, "BadRequest", unknown))
    by_name = found(site, tmp_path)
    assert by_name["KubeRay's operator"].outcome == "failed"
    assert "infl-ignored" in by_name["KubeRay's operator"].detail
    assert "older than v1.6" in str(by_name["the RayJob"].next_step)


def test_one_node_is_too_few_for_two(site: KubernetesStub, tmp_path: Path) -> None:
    site.remove("/api/v1/nodes/gpu-1")
    check = found(site, tmp_path)["GPU nodes"]
    assert (check.outcome, "only 1 that takes pods has 8 GPUs" in check.detail) == ("failed", True)


def test_a_job_or_pods_of_the_run_keep_a_rayjob_from_being_made(
    backend: KuberayBackend, stub: KubernetesStub
) -> None:
    run = two_node_run()
    there = stub.put(f"{JOBS}/{RUN}", rayjob(run) | {"kind": "Job", "status": {"active": 1, "ready": 1}})
    with pytest.raises(errors.ConflictError, match=f"it is there as Job lab/{RUN}"):
        backend.submit(run)
    there["status"] = {"failed": 1, "conditions": [{"type": "Failed", "status": "True"}]}
    item = stub.put(f"{PODS}/head", ray_pod(f"{RUN}-abcde"))
    assert backend.get(RUN).phase is Phase.EXECUTING
    assert backend.list()[RUN].phase is Phase.EXECUTING
    with pytest.raises(errors.ConflictError, match="cannot be started: pod "):
        backend.submit(run)
    assert stub.count("POST", "") == 0
    item["status"]["phase"] = "Succeeded"
    assert backend.submit(run) is True


def test_a_rayjob_that_is_being_deleted_is_not_adopted(backend: KuberayBackend, stub: KubernetesStub) -> None:
    item = put(stub, deployment="Running", job="RUNNING")
    item["metadata"]["deletionTimestamp"] = AT
    assert backend.get(RUN).phase is backend.list()[RUN].phase is Phase.STOPPING
    with pytest.raises(errors.ConflictError, match="is being deleted"):
        backend.submit(two_node_run())
    assert stub.count("POST", "") == 0
