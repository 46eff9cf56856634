"""Runs as trainings of Run:ai, against the stub: adopting, generations, phases, stopping, the story."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from influence.rundir import ConflictError, RunPaths, RunSpec, claim_attempt, create_run
from launcher.backends import open_backend
from launcher.backends.runai import RunaiBackend
from launcher.backends.runai_client import RunaiClient
from launcher.backends.runai_phases import PHASES
from launcher.errors import BackendError
from launcher.profiles import Profile
from launcher.render import render_template
from launcher.runai_values import TEMPLATE, training_values
from launcher.states import Phase
from tests.launcher.kubernetes_stub import running_stub
from tests.launcher.runai_stub import CLUSTER_ID, PROJECT, PROJECT_ID, Fault, RunaiStub
from tests.launcher.test_render_job import run_of
from tests.launcher.test_runai_client import (
    ENVIRONMENT,
    QUICK,
    access_to,
    assert_no_secrets,
    everything_told,
    no_proxies,
    stub,
)

__all__ = ["no_proxies", "stub"]

RUN = run_of("smoke", ("tiny-cpu",))
NAME = RUN.run
OTHER = RunSpec.new(
    NAME, {**RUN.spec, "training": {**RUN.spec["training"], "seed": 7}}, wandb=RUN.wandb, provenance={}
)


def backend_for(stub: RunaiStub, **settings: Any) -> RunaiBackend:
    access = access_to(stub.url, **settings.pop("access", {}))
    profile = Profile(name="lab", backend="runai", runai=access, **settings)
    client = RunaiClient(access, ENVIRONMENT, limits=replace(QUICK, backoff_s=0), sleep=lambda _: None)
    return RunaiBackend(profile, client, sleep=lambda _: None)


@pytest.fixture
def backend(stub: RunaiStub) -> Iterator[RunaiBackend]:
    yield backend_for(stub)


@pytest.fixture(params=[True, False], ids=["variables in the list", "no variables in the list"])
def either(request: pytest.FixtureRequest, stub: RunaiStub) -> RunaiBackend:
    """The list of workloads may tell the environment, or not."""
    stub.tells_variables = request.param
    return backend_for(stub)


def test_a_submit_creates_what_render_shows(stub: RunaiStub, backend: RunaiBackend) -> None:
    assert backend.submit(RUN) is True
    (workload,) = stub.live()
    shown = json.loads(
        render_template(TEMPLATE, training_values(RUN, project_id=PROJECT_ID, cluster_id=CLUSTER_ID))
    )
    assert (workload["name"], workload["spec"]) == (NAME, shown["spec"])
    assert workload["projectId"] == PROJECT_ID


def test_a_second_submit_adopts(stub: RunaiStub, either: RunaiBackend) -> None:
    assert either.submit(RUN) is True
    assert either.submit(RUN) is False
    assert backend_for(stub).submit(replace(RUN, provenance={"user": "bob"})) is False
    assert len(stub.workloads) == 1
    assert either.document(NAME) == RUN


def test_another_spec_is_refused_with_the_difference(stub: RunaiStub, either: RunaiBackend) -> None:
    either.submit(RUN)
    with pytest.raises(ConflictError, match="another run has this name") as caught:
        either.submit(OTHER)
    assert caught.value.difference == ["training.seed: 0 -> 7"]
    assert len(stub.workloads) == 1


def test_two_submits_at_once_make_one_training(stub: RunaiStub) -> None:
    backends = [backend_for(stub) for _ in range(4)]
    runs = [replace(RUN, provenance={"user": f"user-{n}"}) for n in range(4)]
    started: list[bool] = []
    threads = [
        threading.Thread(target=lambda b=b, r=r: started.append(b.submit(r)))
        for b, r in zip(backends, runs, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(started) == [False, False, False, True]
    assert len(stub.workloads) == 1


@pytest.mark.parametrize(
    "kind", ["500", "502", "504", "reset", "silent", "html", "not-json", "empty", "shape"]
)
@pytest.mark.parametrize("after", [True, False], ids=["carried out", "not carried out"])
def test_an_order_to_create_that_is_in_doubt_is_looked_for_and_never_repeated(
    stub: RunaiStub, backend: RunaiBackend, kind: str, after: bool
) -> None:
    stub.faults.append(Fault(kind, after=after, method="POST", part="/trainings"))
    if after:
        assert backend.submit(RUN) is True, "it carries this very submit's document"
    else:
        with pytest.raises(BackendError, match="not known whether") as caught:
            backend.submit(RUN)
        assert "submit again" in str(caught.value.next_step)
        assert_no_secrets(stub, everything_told(caught.value))
    assert stub.calls("POST", "/trainings") == 1
    assert len(stub.workloads) == after
    assert backend.submit(RUN) is not after
    assert len(stub.workloads) == 1


def test_what_appears_late_is_still_found(stub: RunaiStub) -> None:
    """A gateway gives up, and the control plane creates it a moment later."""
    stub.faults.append(Fault("504", method="POST", part="/trainings"))
    bob = replace(RUN, provenance={"user": "bob"})
    backend = backend_for(stub)
    backend._sleep = lambda _: stub.live() or backend_for(stub).submit(bob)
    assert backend.submit(RUN) is False, "somebody else's"
    assert len(stub.workloads) == 1


def test_a_name_that_is_taken_meanwhile_is_adopted_or_refused(stub: RunaiStub, backend: RunaiBackend) -> None:
    """The 409 comes though the list, asked before, was empty."""
    backend_for(stub).submit(replace(RUN, provenance={"user": "bob"}))
    empty = json.dumps({"workloads": []}).encode()
    stub.faults.append(Fault("list", method="GET", part="/workloads", body=empty, times=2))
    stub.faults[-1].kind = "shape"
    assert backend.submit(RUN) is False
    stub.faults.append(Fault("shape", method="GET", part="/workloads", body=empty, times=2))
    with pytest.raises(ConflictError, match="seed: 0 -> 7"):
        backend.submit(OTHER)
    assert len(stub.workloads) == 1


def test_a_name_that_something_unlisted_has_is_told(stub: RunaiStub, backend: RunaiBackend) -> None:
    stub.faults.append(Fault("409", method="POST", part="/trainings"))
    with pytest.raises(BackendError, match=r"says that the name .* is taken, and lists nothing"):
        backend.submit(RUN)


@pytest.mark.parametrize("kind", ["training", "workspace"])
def test_a_foreign_workload_of_the_name_is_left_alone(
    stub: RunaiStub, either: RunaiBackend, kind: str
) -> None:
    stub.add(NAME, type=kind, spec={"image": "x", "environmentVariables": [{"name": "A", "value": "b"}]})
    for ask in (lambda: either.submit(RUN), lambda: either.document(NAME)):
        with pytest.raises(BackendError, match="no run of the launcher's"):
            ask()
    assert either.get(NAME).phase is Phase.ABSENT
    assert either.cancel(NAME).phase is Phase.ABSENT
    assert len(stub.live()) == 1
    assert stub.calls("POST", "/trainings") == stub.calls("DELETE") == 0


def test_names_are_exact_and_projects_apart(stub: RunaiStub, either: RunaiBackend) -> None:
    """Whatever the filter lets through: longer names, other projects, what was copied in Run:ai's pages."""
    either.submit(RUN)
    spec = stub.live()[0]["spec"]
    stub.workloads.clear()
    stub.ignores_filters = True
    stub.add(f"{NAME}-extra", spec=spec)
    stub.add(f"{NAME}-r1", spec=spec)
    stub.add("copy", spec=spec)
    stub.add(NAME, project="lab-two", spec=spec)
    assert either.get(NAME).phase is Phase.ABSENT
    assert NAME not in either.list()
    assert either.submit(RUN) is True


def test_two_of_one_name_are_for_a_person_to_sort_out(stub: RunaiStub, backend: RunaiBackend) -> None:
    backend.submit(RUN)
    twin = stub.add(NAME, spec=stub.live()[0]["spec"])
    facts = backend.get(NAME)
    assert facts.phase is Phase.UNREACHABLE
    assert twin["id"] in facts.reason
    assert "delete all but one" in str(facts.next_step)
    with pytest.raises(BackendError, match="several workloads of one name"):
        backend.submit(RUN)


def test_a_run_that_ended_goes_on_as_the_next_generation(stub: RunaiStub, either: RunaiBackend) -> None:
    either.submit(RUN)
    stub.set_phase(NAME, "Failed", "BackoffLimitExceeded", pods=1)
    with pytest.raises(BackendError, match="1 of its pods"):
        either.submit(RUN)
    stub.set_phase(NAME, "Failed", "BackoffLimitExceeded")
    assert either.submit(RUN) is True
    assert [w["name"] for w in stub.live()] == [NAME, f"{NAME}-r2"]
    assert either.submit(RUN) is False
    with pytest.raises(ConflictError):
        either.submit(OTHER)
    stub.set_phase(f"{NAME}-r2", "Running")
    assert either.get(NAME).phase is Phase.EXECUTING
    assert {run: facts.phase for run, facts in either.list().items()} == {NAME: Phase.EXECUTING}
    stub.set_phase(f"{NAME}-r2", "Completed")
    assert either.submit(RUN) is True
    assert [w["name"] for w in stub.live()][2:] == [f"{NAME}-r3"]


def test_a_run_that_is_named_like_a_generation_is_none(stub: RunaiStub, either: RunaiBackend) -> None:
    own = RunSpec.new(f"{NAME}-r2", RUN.spec, wandb=RUN.wandb)
    either.submit(own)
    stub.set_phase(own.run, "Running")
    assert either.get(NAME).phase is Phase.ABSENT
    assert either.submit(RUN) is True
    stub.set_phase(NAME, "Failed")
    assert either.get(NAME).phase is Phase.FAILED
    with pytest.raises(BackendError, match="no run of the launcher's"):
        either.submit(RUN)
    assert len(stub.workloads) == 2


def test_a_server_that_mixes_deleted_trainings_in_confuses_nobody(
    stub: RunaiStub, either: RunaiBackend
) -> None:
    stub.ignores_filters = True
    either.submit(RUN)
    stub.set_phase(NAME, "Running")
    assert either.get(NAME).phase is either.list()[NAME].phase is Phase.EXECUTING
    assert either.cancel(NAME).phase is Phase.CANCELLED
    assert either.submit(RUN) is True
    stub.set_phase(f"{NAME}-r2", "Running")
    assert either.get(NAME).phase is either.list()[NAME].phase is Phase.EXECUTING


def test_a_generation_that_cannot_be_told_is_not_created_again(stub: RunaiStub) -> None:
    """Even by a server that would take the name twice."""
    stub.tells_variables = stub.unique_names = False
    backend = backend_for(stub)
    backend.submit(RUN)
    stub.set_phase(NAME, "Failed")
    backend.submit(RUN)
    later = stub.live(f"{NAME}-r2")[0]["id"]
    stub.faults.append(Fault("404", method="GET", part=later, times=99))
    with pytest.raises(BackendError, match=f"'{NAME}-r2' is in Run:ai's project"):
        backend.submit(RUN)
    assert len(stub.workloads) == 2


def test_cancel_deletes_and_the_run_is_still_found(stub: RunaiStub, either: RunaiBackend) -> None:
    either.submit(RUN)
    stub.set_phase(NAME, "Running", pods=1)
    assert either.cancel(NAME).phase is Phase.CANCELLED
    assert either.cancel(NAME).phase is Phase.CANCELLED
    assert stub.calls("DELETE") == 1
    facts = either.get(NAME)
    assert facts.phase is Phase.CANCELLED
    assert facts.document == RUN
    assert either.list()[NAME].phase is Phase.CANCELLED
    with pytest.raises(ConflictError):
        either.submit(OTHER)
    assert either.submit(RUN) is True
    assert [w["name"] for w in stub.live()] == [f"{NAME}-r2"]
    assert either.list()[NAME].phase is Phase.QUEUED


def test_cancel_waits_for_the_pod(stub: RunaiStub, backend: RunaiBackend) -> None:
    stub.graceful = True
    backend.submit(RUN)
    facts = backend.cancel(NAME, timeout_s=0)
    assert facts.phase is Phase.STOPPING
    with pytest.raises(BackendError, match="being stopped"):
        backend.submit(RUN)

    looks = 0

    def pass_by(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            stub.live()[0] |= {"deletedAt": "2026-02-21T10:00:00Z"}

    backend._sleep = pass_by
    assert backend.cancel(NAME).phase is Phase.CANCELLED
    assert stub.calls("DELETE") == 1, "it was under way"


@pytest.mark.parametrize("phase", ["Completed", "Failed"])
def test_what_has_ended_is_not_cancelled(stub: RunaiStub, backend: RunaiBackend, phase: str) -> None:
    backend.submit(RUN)
    stub.set_phase(NAME, phase)
    assert backend.cancel(NAME).phase is PHASES[phase]
    assert stub.calls("DELETE") == 0


@pytest.mark.parametrize("phase", ["Completed", "Failed"])
def test_what_run_ai_tidied_away_keeps_its_end(stub: RunaiStub, backend: RunaiBackend, phase: str) -> None:
    backend.submit(RUN)
    stub.set_phase(NAME, phase)
    stub.live()[0] |= {"deletedAt": "2026-03-01T00:00:00Z"}
    assert backend.get(NAME).phase is PHASES[phase]
    assert "deleted at 2026-03-01" in backend.get(NAME).reason


@pytest.mark.parametrize("verb", ["cancel", "suspend", "resume"])
@pytest.mark.parametrize("after", [True, False])
def test_an_order_in_doubt_is_looked_after(
    stub: RunaiStub, backend: RunaiBackend, verb: str, after: bool
) -> None:
    backend.submit(RUN)
    stub.set_phase(NAME, "Stopped" if verb == "resume" else "Running")
    method = "DELETE" if verb == "cancel" else "POST"
    stub.faults.append(Fault("502", after=after, method=method, part="/trainings/"))
    carried_out = {"cancel": Phase.CANCELLED, "suspend": Phase.SUSPENDED, "resume": Phase.BACKING_OFF}
    if after:
        assert getattr(backend, verb)(NAME).phase is carried_out[verb]
    else:
        with pytest.raises(BackendError, match="failed \\(502"):
            getattr(backend, verb)(NAME)
    assert stub.calls(method, "/trainings/") == 1


def test_suspend_and_resume(stub: RunaiStub, backend: RunaiBackend) -> None:
    stub.graceful = True
    backend.submit(RUN)
    stub.set_phase(NAME, "Running", pods=1)
    looks = 0

    def pass_by(_: float) -> None:
        nonlocal looks
        looks += 1
        stub.set_phase(NAME, "Stopped" if looks > 2 else "Stopping")

    backend._sleep = pass_by
    assert backend.suspend(NAME).reason == "suspended"
    assert looks == 3, "Stopping is not yet Stopped"
    assert backend.suspend(NAME).phase is Phase.SUSPENDED
    assert backend.submit(RUN) is False
    assert backend.resume(NAME).phase is Phase.BACKING_OFF
    stub.set_phase(NAME, "Running")
    assert backend.resume(NAME).phase is Phase.EXECUTING
    assert (stub.calls("POST", "/suspend"), stub.calls("POST", "/resume")) == (1, 1)
    assert backend.suspend("infl-none").phase is Phase.ABSENT
    assert backend.resume("infl-none").phase is Phase.ABSENT


ALL_PHASES = {
    "Creating": Phase.QUEUED, "Initializing": Phase.QUEUED, "Pending": Phase.QUEUED, "Updating": Phase.QUEUED,
    "Resuming": Phase.BACKING_OFF, "Running": Phase.EXECUTING, "Degraded": Phase.EXECUTING,
    "Stopping": Phase.SUSPENDED, "Stopped": Phase.SUSPENDED, "Deleting": Phase.STOPPING,
    "Terminating": Phase.STOPPING, "Completed": Phase.COMPLETED, "Failed": Phase.FAILED,
    "Unknown": Phase.UNREACHABLE, "Dreaming": Phase.UNREACHABLE, "": Phase.UNREACHABLE,
}  # fmt: skip


@pytest.mark.parametrize("word", ALL_PHASES)
def test_every_phase_has_a_meaning(stub: RunaiStub, backend: RunaiBackend, word: str) -> None:
    backend.submit(RUN)
    stub.set_phase(NAME, word, "the words\nof Run:ai")
    for facts in (backend.get(NAME), backend.list()[NAME]):
        assert facts.phase is ALL_PHASES[word]
        assert facts.reason.endswith("the words of Run:ai")
        assert facts.started_at is not None
    if ALL_PHASES[word] is Phase.UNREACHABLE:
        assert not word or f"'{word}'" in facts.reason
        with pytest.raises(BackendError, match="unknown"):
            backend.submit(RUN)
    assert "degraded" in facts.reason or word != "Degraded"


def test_a_quota_says_what_a_person_can_do(stub: RunaiStub, backend: RunaiBackend) -> None:
    backend.submit(RUN)
    stub.set_phase(NAME, "Pending", "over quota", reason="NonPreemptibleOverQuota")
    assert "cluster.preemptible=true" in str(backend.get(NAME).next_step)


def test_a_list_is_one_listing_whatever_the_number_of_runs(stub: RunaiStub, backend: RunaiBackend) -> None:
    backend.submit(RUN)
    spec = stub.live()[0]["spec"]
    stub.workloads.clear()
    for number in range(8):
        run = RunSpec.new(f"infl-{number}", RUN.spec, wandb=RUN.wandb)
        variable = {"name": "INFL_RUN_JSON", "value": json.dumps(run.to_dict()).replace("$", "$$")}
        stub.add(run.run, spec={**spec, "environmentVariables": [variable]})
    stub.add("a-notebook", spec={"environmentVariables": [{"name": "A", "value": "b"}]})
    stub.requests.clear()
    listed = backend.list()
    assert list(listed) == [f"infl-{number}" for number in range(8)]
    assert all(listed[run].document.run == run for run in listed)  # type: ignore[union-attr]
    # Pages of two in this test: five of what is there, and one of what was deleted.
    assert len(stub.requests) == 6
    assert stub.calls("GET", "/trainings") == 0


def test_a_list_without_variables_goes_by_the_names(stub: RunaiStub, backend: RunaiBackend) -> None:
    stub.tells_variables = False
    for name in ("infl-a", "infl-a-r2", "infl-b-r2", "notebook", "infl-a-r02"):
        stub.add(name, phase="Failed" if name == "infl-a" else "Running")
    listed = backend.list()
    assert set(listed) == {"infl-a", "infl-b-r2", "infl-a-r02"}
    assert listed["infl-a"].phase is Phase.EXECUTING


@pytest.mark.parametrize(
    ("access", "told"),
    [
        ({"project": "none"}, "no project 'none'"),
        ({"cluster": "hall-9"}, "no cluster 'hall-9'"),
        ({"project": "a,b==c"}, "cannot be a project's name"),
    ],
)
def test_a_profile_that_is_wrong_is_told(stub: RunaiStub, access: dict[str, str], told: str) -> None:
    with pytest.raises(BackendError, match=told) as caught:
        _submit_with(stub, access)
    assert caught.value.next_step
    assert not stub.workloads


def _submit_with(stub: RunaiStub, access: dict[str, str]) -> bool:
    settings = replace(access_to(stub.url), **access)
    client = RunaiClient(settings, ENVIRONMENT, limits=QUICK, sleep=lambda _: None)
    return RunaiBackend(Profile(name="lab", backend="runai", runai=settings), client).submit(RUN)


@pytest.mark.parametrize("cluster", [None, "hall-1", CLUSTER_ID])
def test_the_cluster_is_found_by_name_or_id(stub: RunaiStub, cluster: str | None) -> None:
    assert _submit_with(stub, {} if cluster is None else {"cluster": cluster})


def test_a_project_of_two_clusters_needs_the_cluster(stub: RunaiStub) -> None:
    stub.projects.append({"id": "9", "name": PROJECT, "clusterId": "other"})
    with pytest.raises(BackendError, match="has 2 projects 'lab'"):
        _submit_with(stub, {})
    assert _submit_with(stub, {"cluster": "hall-1"})


def test_several_nodes_are_refused_before_anything_is_asked(stub: RunaiStub, backend: RunaiBackend) -> None:
    hardware = {**RUN.spec["hardware"], "nodes": 2}
    run = RunSpec.new(NAME, {**RUN.spec, "hardware": hardware}, wandb=RUN.wandb)
    refusal = backend.refusal(run)
    assert refusal is not None
    assert "kuberay" in refusal.lacking[0]
    assert f"runai-{PROJECT}" in refusal.lacking[0]
    with pytest.raises(BackendError, match="cannot run on Run:ai"):
        backend.submit(run)
    assert backend.refusal(RUN) is None
    assert not stub.requests


def test_a_control_plane_that_is_away_makes_the_state_unknown(stub: RunaiStub, backend: RunaiBackend) -> None:
    stub.faults.append(Fault("503", times=99))
    facts = backend.get(NAME)
    assert facts.phase is Phase.UNREACHABLE
    assert "503" in facts.reason
    with pytest.raises(BackendError):
        backend.list()


def test_logs_come_from_the_run_directory(stub: RunaiStub, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no log of run") as caught:
        backend_for(stub).attempts(NAME)
    assert "set root" in str(caught.value.next_step)
    paths = RunPaths.of(tmp_path, NAME)
    create_run(paths, RUN)
    claim_attempt(paths, pod="pod-a")
    paths.log(1).write_bytes(b"one\ntwo\n")
    backend = backend_for(stub, root=tmp_path)
    assert list(backend.attempts(NAME)) == [1]
    assert backend.read_log(NAME, 1, 4) == b"two\n"
    assert backend.read_log(NAME, 1, 8) == backend.read_log(NAME, 2, 0) == b""


def test_logs_come_from_the_pods_where_there_is_a_kubeconfig(stub: RunaiStub, tmp_path: Path) -> None:
    with running_stub() as kubernetes:
        config = kubernetes.profile(tmp_path).kubeconfig
        backend = backend_for(stub, kubeconfig=config, root=tmp_path / "runs")
        assert list(backend.attempts(NAME)) == []
        for number, name in enumerate(("pod-b", "pod-a", "pod-other"), start=1):
            state = {"terminated": {"exitCode": 1, "startedAt": f"2026-02-21T0{number}:00:01Z"}}
            kubernetes.put(
                f"/api/v1/namespaces/runai-lab/pods/{name}",
                {
                    "metadata": {
                        "labels": {"infl/run": "infl-x" if name == "pod-other" else NAME},
                        "creationTimestamp": f"2026-02-21T0{number}:00:00Z",
                    },
                    "spec": {"containers": [{"name": f"{NAME}-0-0"}]},
                    "status": {
                        "phase": "Failed",
                        "containerStatuses": [{"name": f"{NAME}-0-0", "state": state}],
                    },
                },
            )
            kubernetes.logs[name] = [(f"2026-02-21T0{number}:00:02.000000001Z", f"line of {name}")]
            kubernetes.ended_logs.add(name)
        assert list(backend.attempts(NAME)) == [1, 2]
        assert backend.read_log(NAME, 1, 0) == b"line of pod-b\n"
        assert backend.read_log(NAME, 2, 5) == b"of pod-a\n"
        assert backend.read_log(NAME, 2, 14) == backend.read_log(NAME, 3, 0) == b""
        (container,) = {
            request.query["container"] for request in kubernetes.requests if "/log" in request.path
        }
        assert container == f"{NAME}-0-0", "whatever Run:ai calls it"


def test_a_pod_that_is_gone_lends_its_number_to_none(stub: RunaiStub, tmp_path: Path) -> None:
    """Also where its successor has the same name."""
    with running_stub() as kubernetes:
        backend = backend_for(stub, kubeconfig=kubernetes.profile(tmp_path).kubeconfig)

        def put(uid: str, hour: int) -> None:
            started = {"running": {"startedAt": f"2026-02-21T{hour}:00:01Z"}}
            kubernetes.put("/api/v1/namespaces/runai-lab/pods/pod-0", {
                "metadata": {
                    "uid": uid, "labels": {"infl/run": NAME},
                    "creationTimestamp": f"2026-02-21T{hour}:00:00Z",
                },
                "spec": {"containers": [{"name": "main"}]},
                "status": {
                    "phase": "Running", "containerStatuses": [{"name": "main", "state": started}],
                },
            })  # fmt: skip
            kubernetes.logs["pod-0"] = [(f"2026-02-21T{hour}:00:02.000000001Z", f"line of {uid}")]

        put("uid-1", 10)
        assert list(backend.attempts(NAME)) == [1]
        assert backend.read_log(NAME, 1, 0) == b"line of uid-1\n"
        kubernetes.remove("/api/v1/namespaces/runai-lab/pods/pod-0")
        put("uid-2", 11)
        assert list(backend.attempts(NAME)) == [1, 2]
        assert backend.read_log(NAME, 1, 14) == b""
        assert backend.read_log(NAME, 2, 0) == b"line of uid-2\n"


def test_the_history_lays_the_trainers_records_beside_the_pods(stub: RunaiStub, tmp_path: Path) -> None:
    paths = RunPaths.of(tmp_path, NAME)
    create_run(paths, RUN)
    claim_attempt(paths, pod="pod-gone", started_at="2026-02-21T08:00:00.000Z").finish(1, "CUDA error")
    claim_attempt(paths, pod="pod-a", node="gpu-3", started_at="2026-02-21T10:00:00.000Z")
    backend = backend_for(stub, root=tmp_path)
    backend.submit(RUN)
    stub.pods[stub.live()[0]["id"]] = [
        {"name": "pod-a", "nodeName": "gpu-3", "k8sPhase": "Running", "createdAt": "2026-02-21T09:59:00Z",
         "completedAt": None, "containers": []},
        {"name": "pod-0", "nodeName": None, "k8sPhase": "Failed", "createdAt": "2026-02-21T07:00:00Z",
         "completedAt": "2026-02-21T07:01:00Z"},
    ]  # fmt: skip
    told = [(a.number, a.pod, a.exit_code, a.ended_by) for a in backend.history(NAME)]
    assert told == [
        (None, "pod-0", None, "failed"),
        (1, "pod-gone", 1, "failed (exit code 1): CUDA error"),
        (2, "pod-a", None, None),
    ]
    assert backend.history(NAME)[2].where == "pod pod-a on node gpu-3"
    assert len(backend_for(stub).history(NAME)) == 2, "without the directory, the pods alone"


def test_events_tell_phases_and_the_clusters_events_once(stub: RunaiStub, backend: RunaiBackend) -> None:
    backend.submit(RUN)
    id_ = stub.live()[0]["id"]
    event = {
        "createdAt": "2026-02-21T10:00:05+01:00", "type": "Warning", "reason": "FailedScheduling",
        "message": "0/8 nodes\x1b[31m", "involvedObject": {"kind": "Pod", "name": "pod-a", "uid": "u"},
    }  # fmt: skip
    stub.events[id_] = [event]
    stub.history[id_] = [
        {"meta": {"creationTimestamp": "2026-02-21T09:00:06.5Z", "type": "PhaseUpdate"},
         "spec": {"phaseUpdate": {"phase": "Pending", "phaseMessage": "no room"}}},
        {"meta": {"creationTimestamp": "2026-02-21T09:00:05Z", "type": "Event"}, "spec": {"event": event}},
    ]  # fmt: skip
    told = [(e.at, e.about, e.reason, e.message, e.warning) for e in backend.events(NAME)]
    assert told == [
        ("2026-02-21T09:00:05.000Z", "Pod pod-a", "FailedScheduling", "0/8 nodes [31m", True),
        ("2026-02-21T09:00:06.500Z", f"Training {NAME}", "Pending", "waits for machines: no room", False),
    ]
    backend.cancel(NAME)
    assert len(backend.events(NAME)) == 2


def test_a_profile_without_run_ai_or_credentials_does_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="cluster 'lab' has no Run:ai"):
        open_backend(Profile(name="lab", backend="runai"))
    monkeypatch.delenv("RUNAI_CLIENT_ID", raising=False)
    with pytest.raises(BackendError, match="RUNAI_CLIENT_ID is not set"):
        open_backend(Profile(name="lab", backend="runai", runai=access_to("https://lab.run.ai")))
