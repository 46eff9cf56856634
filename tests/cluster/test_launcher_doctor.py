"""``launcher doctor`` on a prepared namespace, and with each thing taken away: the failed check names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.charts.rights import LAUNCHER_RIGHTS, NODE_RIGHTS, Rights
from tests.cluster.bench.bench import Bench
from tests.cluster.bench.namespace import RBAC
from tests.cluster.user import CLAIM, User

RUN = "infl-doctor"
#: What an administrator may grant beyond the chart, and then every check can be made.
MORE_RIGHTS: Rights = {
    ("", "secrets"): {"get"},
    ("", "namespaces"): {"get"},
    ("scheduling.run.ai", "queues"): {"get"},
    ("", "nodes"): {"get", "list"},
    ("", "pods"): {"list"},
}
CLUSTER_ROLES = "/apis/rbac.authorization.k8s.io/v1"


def rules(rights: Rights) -> list[dict[str, Any]]:
    return [
        {"apiGroups": [group], "resources": [resource], "verbs": sorted(verbs)}
        for (group, resource), verbs in rights.items()
    ]


class Patient:
    """A namespace with all that a run in KAI's queue needs, and the launcher as its service account."""

    def __init__(self, bench: Bench, user: User) -> None:
        self.bench, self.user, self.namespace = bench, user, user.namespace
        bench.apply_crds("kai")
        self.queue = f"queue-{self.namespace.name}"
        queues = "/apis/scheduling.run.ai/v2/queues"
        bench.api.create(
            queues,
            {
                "apiVersion": "scheduling.run.ai/v2",
                "kind": "Queue",
                "metadata": {"name": self.queue},
                "spec": {},
            },
        )
        self.queue_path = f"{queues}/{self.queue}"
        self.namespace.create_secret("infl-secrets", {"WANDB_API_KEY": "0" * 40})
        self.namespace.create_service_account("launcher")
        self.namespace.grant("launcher", rules(LAUNCHER_RIGHTS))
        self._grant_everywhere(f"more-{self.namespace.name}")
        user.describe_cluster(self.namespace.service_account_kubeconfig("launcher"))

    def _grant_everywhere(self, name: str) -> None:
        self.cluster_role = f"{CLUSTER_ROLES}/clusterroles/{name}"
        api = self.bench.api
        api.create(f"{CLUSTER_ROLES}/clusterroles", {"metadata": {"name": name}, "rules": rules(MORE_RIGHTS)})
        subject = {"kind": "ServiceAccount", "name": "launcher", "namespace": self.namespace.name}
        binding = {
            "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
            "subjects": [subject],
        }
        api.create(f"{CLUSTER_ROLES}/clusterrolebindings", binding)

    def examined(self, *sets: str, code: int) -> dict[str, dict[str, Any]]:
        """The checks by name."""
        image = f"cluster.image=registry.example.com/influence@sha256:{'0' * 64}"
        data = ("data.train_files=[/srv/train.parquet]", "data.val_files=[/srv/val.parquet]")
        settings = ("cluster.scheduler=kai", f"cluster.queue={self.queue}", image, *data, *sets)
        words = [word for setting in settings for word in ("--set", setting)]
        process = self.user.start(
            "doctor", "--preset", "alltoken-timing", "--name", RUN, *words, "--output", "json"
        )
        output, _ = self.user.ended(process, code)
        document = json.loads(output)
        assert document["ok"] is (code == 0)
        return {check["name"]: check for check in document["checks"]}

    def take_rights(self, group: str, resource: str, *verbs: str) -> None:
        left = {**LAUNCHER_RIGHTS, (group, resource): LAUNCHER_RIGHTS[group, resource] - set(verbs)}
        path = f"{RBAC}/namespaces/{self.namespace.name}/roles/launcher"
        self.bench.api.patch(path, {"rules": rules(left)})

    def remove(self, collection: str, name: str) -> None:
        self.bench.api.delete(f"{self.namespace.core}/{collection}/{name}")


@pytest.fixture
def patient(bench: Bench, user: User) -> Patient:
    return Patient(bench, user)


def test_where_everything_is_right_all_is_ok_and_nothing_is_left_behind(patient: Patient) -> None:
    checks = patient.examined(code=0)
    assert {check["outcome"] for check in checks.values()} == {"ok"}, checks
    told = " ".join(checks)
    for thing in ("API server", "right on jobs.batch", CLAIM, "infl-secrets", "infl-trainer", patient.queue,
                  "GPU nodes", "the Job"):  # fmt: skip
        assert thing in told
    assert patient.bench.api.items(f"{patient.namespace.batch}/jobs") == []


# What is taken away, the check that fails, and what its next step speaks of.
ABSENT: dict[str, tuple[Callable[[Patient], object], str, str]] = {
    "claim": (lambda p: p.remove("persistentvolumeclaims", CLAIM), f"claim {CLAIM}", "charts/influence"),
    "secret": (lambda p: p.remove("secrets", "infl-secrets"), "secret infl-secrets", "kubectl create secret"),
    "account": (
        lambda p: p.remove("serviceaccounts", "infl-trainer"), "service account infl-trainer", "created"),
    "queue": (lambda p: p.bench.api.delete(p.queue_path), "KAI queue ", "correct the name"),
    "rights": (
        lambda p: p.take_rights("batch", "jobs", "create", "patch"), "right on jobs.batch",
        "charts/influence"),
    "quota": (
        lambda p: p.namespace.create_quota("small", {"requests.nvidia.com/gpu": "4"}), "quota small",
        "larger quota"),
}  # fmt: skip


@pytest.mark.parametrize("thing", ABSENT)
def test_what_is_missing_is_named_with_its_next_step(patient: Patient, thing: str) -> None:
    take_away, name, next_step = ABSENT[thing]
    take_away(patient)
    checks = patient.examined(code=5)
    failed = [check for check in checks.values() if check["outcome"] == "failed"]
    assert [check["name"].startswith(name) for check in failed] == [True], failed
    assert next_step in failed[0]["next_step"]
    if thing == "rights":
        assert "create, patch" in failed[0]["detail"]


def test_gpus_of_no_node_are_named_with_those_there_are(patient: Patient) -> None:
    checks = patient.examined("hardware.gpu_product=NVIDIA-B300", code=5)
    assert checks["GPU nodes"]["outcome"] == "failed"
    assert "NVIDIA-H200" in checks["GPU nodes"]["detail"] and checks["GPU nodes"]["next_step"]
    checks = patient.examined("hardware.ranks_per_node=16", code=5)
    assert "16 GPUs" in checks["GPU nodes"]["detail"]


def test_what_may_not_be_looked_at_is_unknown_and_no_failure(patient: Patient) -> None:
    """With the chart's rights alone, and its node viewer's: Secrets, KAI's queues, what others' pods take."""
    patient.bench.api.patch(patient.cluster_role, {"rules": rules(NODE_RIGHTS)})
    checks = patient.examined(code=0)
    unknown = {name for name, check in checks.items() if check["outcome"] == "unknown"}
    assert {"secret infl-secrets", f"KAI queue {patient.queue}"} <= unknown
    assert {checks[name]["outcome"] for name in ("GPU nodes", f"claim {CLAIM}", "the Job")} == {"ok"}


def test_a_server_that_is_away_is_where_the_checks_end(bench: Bench, patient: Patient) -> None:
    with bench.apiserver_killed():
        checks = patient.examined(code=5)
    assert set(checks) <= {"profile", "image", "API server"}  # what needs no server, and the server
    assert {name for name, check in checks.items() if check["outcome"] == "failed"} == {"API server"}
    assert "connection refused" in checks["API server"]["detail"]
