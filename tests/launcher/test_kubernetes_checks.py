"""What doctor finds on a cluster: each thing that is wrong, what may not be seen, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.backends import kubernetes_api
from launcher.backends.kubernetes_api import KubernetesApi
from launcher.backends.kubernetes_checks import KUEUE_RIGHTS, checks
from launcher.backends.kubernetes_rights import rights
from launcher.doctor import Check
from launcher.profiles import Profile
from tests.launcher.kubernetes_objects import JOBS, lab_run
from tests.launcher.kubernetes_stub import KubernetesStub, running_stub, status
from tests.launcher.test_render_job import run_of

CORE = "/api/v1/namespaces/lab"
NODES = "/api/v1/nodes"
REVIEWS = "selfsubjectaccessreviews$"
CANNOT_LIST = 'User "ada" cannot list resource "nodes"'
NOT_ALLOWED = {"kind": "SelfSubjectAccessReview", "metadata": {}, "status": {"allowed": False}}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesStub]:
    """A cluster where everything is as it should be."""
    monkeypatch.setattr(kubernetes_api, "_FIRST_WAIT_S", 0.001)
    with running_stub() as stub:
        stub.objects["/version"] = {"gitVersion": "v1.36.2", "major": "1", "minor": "36+"}
        stub.put("/api/v1/namespaces/lab", {})
        stub.put(f"{CORE}/persistentvolumeclaims/infl-artifacts", {
            "spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Bound"},
        })  # fmt: skip
        stub.put(f"{CORE}/serviceaccounts/infl-trainer", {})
        stub.put(f"{CORE}/secrets/infl-secrets", {"data": {"WANDB_API_KEY": "c2VjcmV0LWtleQ=="}})
        put_node(stub, "gpu-0")
        yield stub


def put_node(
    stub: KubernetesStub, name: str, *, gpus: str = "8", product: str = "NVIDIA-H200", **spec: Any
) -> None:
    stub.put(f"{NODES}/{name}", {
        "metadata": {"labels": {"nvidia.com/gpu.product": product}}, "spec": spec,
        "status": {
            "allocatable": {"nvidia.com/gpu": gpus}, "conditions": [{"type": "Ready", "status": "True"}],
        },
    })  # fmt: skip


def found(
    stub: KubernetesStub, tmp_path: Path, *sets: str, profile: Profile | None = None
) -> dict[str, Check]:
    all_checks = list(checks(profile or stub.profile(tmp_path), lab_run(*sets)))
    by_name = {check.name: check for check in all_checks}
    assert len(by_name) == len(all_checks)
    for check in all_checks:
        assert check.detail and (check.outcome not in ("failed", "unknown") or check.next_step), check
        assert "secret-key" not in str(check) and "c2VjcmV0" not in str(check)
    return by_name


def test_a_good_cluster_passes_every_check(stub: KubernetesStub, tmp_path: Path) -> None:
    by_name = found(stub, tmp_path)
    assert {name: check.outcome for name, check in by_name.items() if check.outcome != "ok"} == {}
    assert "Kubernetes v1.36.2" in by_name["API server"].detail
    assert by_name["GPU nodes"].detail.endswith("and at least 8 GPUs, 1 of them free now")
    assert by_name["secret infl-secrets"].detail == "has WANDB_API_KEY"
    asked = {
        (a["group"], a["resource"], a["subresource"], a["verb"])
        for r in stub.requests if "reviews" in r.path
        for a in [r.body["spec"]["resourceAttributes"]]
    }  # fmt: skip
    assert asked == {
        *(("batch", "jobs", "", verb) for verb in ("create", "get", "list", "watch", "patch")),
        *(("", "pods", "", verb) for verb in ("get", "list", "watch")),
        ("", "pods", "log", "get"), ("", "events", "", "list"),
    }  # fmt: skip
    dry = next(r for r in stub.requests if r.path == JOBS and r.method == "POST")
    assert dry.query == {"dryRun": "All"}
    assert all(r.method == "GET" or "reviews" in r.path or r.query for r in stub.requests)


def test_a_server_that_is_away_ends_the_checks(stub: KubernetesStub, tmp_path: Path) -> None:
    stub.stop()
    by_name = found(stub, tmp_path)
    assert list(by_name) == ["API server"]
    assert by_name["API server"].outcome == "failed"


def test_credentials_that_are_not_accepted_end_the_checks(stub: KubernetesStub, tmp_path: Path) -> None:
    stub.fail("GET", "/version$", status=401, body=status(401, "Unauthorized", "Unauthorized"))
    assert list(found(stub, tmp_path)) == ["API server"]


def test_an_old_server_is_refused(stub: KubernetesStub, tmp_path: Path) -> None:
    stub.objects["/version"] = {"gitVersion": "v1.30.9", "major": "1", "minor": "30"}
    assert list(found(stub, tmp_path)) == ["API server"]


@pytest.mark.parametrize(
    ("path", "name", "words"),
    [
        ("/api/v1/namespaces/lab", "namespace lab", "cluster.namespace"),
        (f"{CORE}/persistentvolumeclaims/infl-artifacts", "claim infl-artifacts", "charts/influence"),
        (f"{CORE}/serviceaccounts/infl-trainer", "service account infl-trainer", "created"),
        (f"{CORE}/secrets/infl-secrets", "secret infl-secrets",
         "`kubectl create secret generic infl-secrets -n lab --from-env-file=secrets.env`, a file with "
         "the lines WANDB_API_KEY=..."),
    ],
)  # fmt: skip
def test_what_is_not_there_and_what_may_not_be_seen(
    stub: KubernetesStub, tmp_path: Path, path: str, name: str, words: str
) -> None:
    stub.fail("GET", f"{path}$", status=403, body=status(403, "Forbidden", "no"))
    hidden = found(stub, tmp_path)[name]
    resource, _, there = path.removeprefix(f"{CORE}/").removeprefix("/api/v1/").partition("/")
    assert hidden.outcome == "unknown"
    assert f"`kubectl get {resource} {there}" in str(hidden.next_step)
    stub.remove(path)
    check = found(stub, tmp_path)[name]
    assert (check.outcome, check.detail) == ("failed", "is not there")
    assert words in str(check.next_step)


def test_a_secret_without_its_key_and_one_that_nobody_needs(stub: KubernetesStub, tmp_path: Path) -> None:
    stub.put(f"{CORE}/secrets/infl-secrets", {"data": {"OTHER": "x"}})
    incomplete = found(stub, tmp_path)["secret infl-secrets"]
    assert incomplete.detail == "has no WANDB_API_KEY"
    assert "--dry-run=client --output=yaml | kubectl apply -f -" in str(incomplete.next_step)
    assert "secret infl-secrets" not in found(stub, tmp_path, "wandb.mode=offline")
    store = ("cluster.storage=object_store", "cluster.object_store=s3://bucket/a", "wandb.mode=offline")
    by_name = found(stub, tmp_path, *store)
    assert by_name["secret infl-secrets"].detail == "has no AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
    assert "claim infl-artifacts" not in by_name


def test_pull_secrets_are_looked_for(stub: KubernetesStub, tmp_path: Path) -> None:
    assert found(stub, tmp_path, "cluster.image_pull_secrets=[regcred]")["secret regcred"].outcome == "failed"


def test_each_missing_right_is_named(stub: KubernetesStub, tmp_path: Path) -> None:
    stub.fail("POST", REVIEWS, status=201, body=NOT_ALLOWED, times=5)
    by_name = found(stub, tmp_path)
    jobs = by_name["right on jobs.batch"]
    assert jobs.outcome == "failed"
    assert jobs.detail == "create, get, list, watch, patch in namespace 'lab' is missing"
    assert "charts/influence" in str(jobs.next_step)
    assert by_name["right on pods"].outcome == "ok"


def test_a_namespace_without_any_right_is_one_failure(stub: KubernetesStub, tmp_path: Path) -> None:
    """As after a slip in its name: whoever may see only their own cannot see that it is not there."""
    stub.fail("GET", "/api/v1/namespaces/lab$", status=403, body=status(403, "Forbidden", "no"))
    stub.fail("POST", REVIEWS, status=201, body=NOT_ALLOWED, times=10)
    by_name = found(stub, tmp_path)
    assert list(by_name) == ["API server", "namespace lab", "rights"]
    assert by_name["rights"].detail == (
        "you have none in namespace 'lab': jobs.batch, pods, pods/log, events"
    )
    assert str(by_name["rights"].next_step).startswith("correct cluster.namespace in launcher.yaml")


def test_a_namespace_that_is_not_there_ends_the_checks(stub: KubernetesStub, tmp_path: Path) -> None:
    stub.remove("/api/v1/namespaces/lab")
    assert list(found(stub, tmp_path)) == ["API server", "namespace lab"]


def test_a_right_that_the_chart_gives_by_an_option_is_told_with_it(
    stub: KubernetesStub, tmp_path: Path
) -> None:
    stub.fail("POST", REVIEWS, status=201, body=NOT_ALLOWED, times=1)
    jobs = found(stub, tmp_path)["right on jobs.batch"]
    assert "=true" not in str(jobs.next_step)
    (kueue,) = rights(KubernetesApi(stub.profile(tmp_path)), "lab", KUEUE_RIGHTS)
    assert kueue.outcome == "ok"
    stub.fail("POST", REVIEWS, status=201, body=NOT_ALLOWED, times=3)
    (kueue,) = rights(KubernetesApi(stub.profile(tmp_path)), "lab", KUEUE_RIGHTS)
    assert "charts/influence makes with kueue.enabled=true" in str(kueue.next_step)
    stub.fail("GET", "^/api/v1/nodes$", status=403, body=status(403, "Forbidden", CANNOT_LIST))
    assert "nodeViewer.enabled=true" in str(found(stub, tmp_path)["GPU nodes"].next_step)


@pytest.mark.parametrize(
    ("phase", "modes", "outcome"),
    [("Pending", ["ReadWriteMany"], "warning"), ("Lost", ["ReadWriteMany"], "failed"),
     ("Bound", ["ReadWriteOnce"], "warning"), ("Bound", ["ReadWriteMany"], "ok")],
)  # fmt: skip
def test_a_claims_state(
    stub: KubernetesStub, tmp_path: Path, phase: str, modes: list[str], outcome: str
) -> None:
    path = f"{CORE}/persistentvolumeclaims/infl-artifacts"
    stub.put(path, {"spec": {"accessModes": modes}, "status": {"phase": phase}})
    assert found(stub, tmp_path)["claim infl-artifacts"].outcome == outcome


def test_queues_of_kai_and_kueue(stub: KubernetesStub, tmp_path: Path) -> None:
    kai = ("cluster.scheduler=kai", "cluster.queue=infl")
    assert found(stub, tmp_path, *kai)["KAI queue infl"].outcome == "failed"
    stub.put("/apis/scheduling.run.ai/v2/queues/infl", {})
    assert found(stub, tmp_path, *kai)["KAI queue infl"].outcome == "ok"
    kueue = ("cluster.scheduler=kueue", "cluster.queue=research")
    by_name = found(stub, tmp_path, *kueue)
    assert by_name["Kueue's queue research"].outcome == "failed"
    assert by_name["right on workloads.kueue.x-k8s.io"].outcome == "ok"
    path = "/apis/kueue.x-k8s.io/v1beta2/namespaces/lab/localqueues/research"
    stub.put(path, {"status": {"conditions": [{"type": "Active", "status": "True"}]}})
    assert found(stub, tmp_path, *kueue)["Kueue's queue research"].outcome == "ok"
    stub.put(path, {"status": {"conditions": [{"type": "Active", "status": "False", "message": "stopped"}]}})
    assert found(stub, tmp_path, *kueue)["Kueue's queue research"].detail == "takes no work: stopped"


def test_a_priority_class_that_is_not_there(stub: KubernetesStub, tmp_path: Path) -> None:
    assert found(stub, tmp_path, "cluster.priority_class=high")["priority class high"].outcome == "failed"


def test_nodes_that_do_not_fit_are_told_with_those_there_are(stub: KubernetesStub, tmp_path: Path) -> None:
    check = found(stub, tmp_path, "hardware.gpu_product=NVIDIA-B200")["GPU nodes"]
    assert check.outcome == "failed"
    assert "none of 1 nodes has nvidia.com/gpu.product=NVIDIA-B200; products: NVIDIA-H200" in check.detail
    put_node(stub, "gpu-0", gpus="4")
    assert "none that takes pods has 8 GPUs" in found(stub, tmp_path)["GPU nodes"].detail
    put_node(stub, "gpu-0", unschedulable=True)
    assert found(stub, tmp_path)["GPU nodes"].outcome == "failed"
    on_cpu = run_of("smoke", ("tiny-cpu",), "cluster.namespace=lab")
    assert "GPU nodes" not in {check.name for check in checks(stub.profile(tmp_path), on_cpu)}


def test_gpus_that_are_taken_are_counted_and_what_may_not_be_seen_is_said(
    stub: KubernetesStub, tmp_path: Path
) -> None:
    taken = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
    stub.put("/api/v1/pods/other", {"spec": {"nodeName": "gpu-0", "containers": [taken, {}]}})
    assert found(stub, tmp_path)["GPU nodes"].outcome == "warning"
    stub.fail("GET", "^/api/v1/pods$", status=403, body=status(403, "Forbidden", "no"))
    assert "what is free cannot be seen" in found(stub, tmp_path)["GPU nodes"].detail
    stub.fail("GET", "^/api/v1/nodes$", status=403, body=status(403, "Forbidden", "no"))
    assert found(stub, tmp_path)["GPU nodes"].outcome == "unknown"


@pytest.mark.parametrize(
    "message", ["exceeded quota: count/jobs.batch", "ValidatingAdmissionPolicy 'p' denied request: no"]
)
def test_a_job_that_a_rule_refuses_is_a_failed_check(
    stub: KubernetesStub, tmp_path: Path, message: str
) -> None:
    stub.fail("POST", "/jobs$", status=403, body=status(403, "Forbidden", message))
    check = found(stub, tmp_path)["the Job"]
    assert (check.outcome, message in check.detail) == ("failed", True)
    stub.fail("POST", "/jobs$", status=403, body=status(403, "Forbidden", 'cannot create resource "jobs"'))
    assert found(stub, tmp_path)["the Job"].outcome == "unknown"  # the check of rights tells it


@pytest.mark.parametrize(
    ("hard", "used", "outcome"), [("4", "0", "failed"), ("16", "12", "warning"), ("16", "8", "ok")]
)
def test_a_quota_on_gpus(stub: KubernetesStub, tmp_path: Path, hard: str, used: str, outcome: str) -> None:
    key = "requests.nvidia.com/gpu"
    stub.put(f"{CORE}/resourcequotas/gpus", {"status": {"hard": {key: hard}, "used": {key: used}}})
    stub.put(f"{CORE}/resourcequotas/other", {"status": {"hard": {"pods": "1"}}})
    by_name = found(stub, tmp_path)
    assert by_name["quota gpus"].outcome == outcome
    assert "quota other" not in by_name


def test_what_the_server_would_refuse_is_found_without_creating_anything(
    stub: KubernetesStub, tmp_path: Path
) -> None:
    body = status(422, "Invalid", "x", causes=[{"field": "spec.template", "message": "no"}])
    stub.fail("POST", "/jobs$", status=422, body=body)
    check = found(stub, tmp_path)["the Job"]
    assert check.outcome == "failed" and "spec.template: no" in check.detail


def test_without_a_run_the_profiles_own_settings_are_looked_at(stub: KubernetesStub, tmp_path: Path) -> None:
    settings = {"cluster": {"claim": "infl-artifacts", "secret": "infl-secrets"}, "wandb": {"mode": "online"}}
    names = {check.name for check in checks(stub.profile(tmp_path, settings=settings), None)}
    assert {"claim infl-artifacts", "secret infl-secrets", "right on jobs.batch"} <= names
    assert not {"the Job", "GPU nodes"} & names
    assert [c.outcome for c in checks(stub.profile(tmp_path), None)].count("ok") >= 6
