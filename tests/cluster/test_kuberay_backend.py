"""RayJobs on a real control plane with KubeRay's own CRDs; a test plays the operator.

The operator itself needs images. So its part is played as its source has it: it writes the status, and makes
the pods of a Ray cluster from the RayJob's templates, whose command is then a shell script here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest

from influence.rundir import ConflictError, RunSpec
from launcher.backends.kuberay import KuberayBackend
from launcher.backends.kuberay_checks import checks
from launcher.backends.kubernetes_errors import ApiForbidden
from launcher.kuberay_values import TEMPLATE, rayjob_values
from launcher.profiles import Profile
from launcher.render import parse_manifest, render_template
from launcher.states import Phase
from tests.cluster.bench.bench import Bench
from tests.cluster.bench.namespace import Namespace
from tests.cluster.bench.waiting import until
from tests.launcher.kuberay_objects import failed_with
from tests.launcher.test_render_job import run_of

RUN = "infl-alltoken-2node-0221"
SMALL = ("hardware.cpus=1", "hardware.memory=1Gi", "hardware.shared_memory=1Gi", "retry.grace_period_s=5")
SCRIPT = "trap 'exit 75' TERM; echo \"$POD_NAME is up\"; while :; do sleep 0.05; done"
AT = "2026-02-21T11:00:00Z"


class Operator:
    """KubeRay, by hand."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._path = f"/apis/ray.io/v1/namespaces/{namespace.name}/rayjobs"

    def rayjob(self, name: str = RUN) -> dict[str, Any]:
        return self._namespace.api.get(f"{self._path}/{name}")

    def write(self, deployment: str, job: str = "", name: str = RUN, **status: Any) -> None:
        body = {"status": {"jobDeploymentStatus": deployment, "jobStatus": job, "startTime": AT, **status}}
        self._namespace.api.patch(f"{self._path}/{name}/status", body)

    def make_pods(self, cluster: str, name: str = RUN) -> None:
        spec = self.rayjob(name)["spec"]["rayClusterSpec"]
        (workers,) = spec["workerGroupSpecs"]
        templates = {"head": spec["headGroupSpec"]["template"], "nodes-worker": workers["template"]}
        for part, template in templates.items():
            pod = copy.deepcopy(template)
            labels = {"ray.io/cluster": cluster, "ray.io/node-type": part.removeprefix("nodes-")}
            pod["metadata"] |= {"name": f"{cluster}-{part}-abcde"}
            pod["metadata"]["labels"] |= labels
            container = pod["spec"]["containers"][0]
            container |= {"command": ["bash", "-c", SCRIPT]}
            container.pop("lifecycle", None)
            self._namespace.api.create(f"{self._namespace.core}/pods", pod)

    def remove_pods(self, cluster: str) -> None:
        for pod in self._namespace.pods(f"ray.io/cluster={cluster}"):
            self._namespace.api.delete(f"{self._namespace.core}/pods/{pod['metadata']['name']}")
        until(lambda: not self._namespace.pods(f"ray.io/cluster={cluster}"), "the cluster's pods gone")


@pytest.fixture
def site(bench: Bench, namespace: Namespace) -> Namespace:
    """What the chart prepares, in a namespace that admits restricted pods only."""
    bench.apply_crds("kuberay")
    namespace.create_claim("infl-artifacts")
    namespace.create_service_account("infl-trainer")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace.api.patch(f"/api/v1/namespaces/{namespace.name}", {"metadata": {"labels": labels}})
    return namespace


@pytest.fixture
def profile(bench: Bench, site: Namespace) -> Profile:
    return Profile(name="bench", backend="kuberay", namespace=site.name, kubeconfig=bench.kubeconfig)


@pytest.fixture
def backend(profile: Profile) -> KuberayBackend:
    return KuberayBackend(profile)


def run_in(site: Namespace, *sets: str) -> RunSpec:
    return run_of("alltoken-2node", (), f"cluster.namespace={site.name}", *SMALL, *sets)


def is_within(part: Any, whole: Any) -> bool:
    """Whether a server kept all that it was given; it adds defaults, and writes quantities its own way."""
    if isinstance(part, Mapping):
        return isinstance(whole, Mapping) and all(
            key in whole and is_within(value, whole[key]) for key, value in part.items()
        )
    if isinstance(part, list):
        return isinstance(whole, list) and len(part) == len(whole) and all(map(is_within, part, whole))
    return bool(part == whole)


@pytest.mark.parametrize("sets", [(), ("cluster.scheduler=kueue", "cluster.queue=q", "cluster.data_claim=d")])
def test_the_crd_takes_the_rayjob_and_drops_nothing(
    backend: KuberayBackend, site: Namespace, sets: tuple[str, ...]
) -> None:
    run = run_in(site, *sets)
    assert backend.submit(run) is True
    sent = parse_manifest(render_template(TEMPLATE, rayjob_values(run)), TEMPLATE)
    assert is_within(sent["spec"], Operator(site).rayjob()["spec"])
    assert backend.document(RUN) == run
    assert backend.submit(run) is False
    with pytest.raises(ConflictError):
        backend.submit(run_in(site, *sets, "training.seed=7"))


def test_doctor_finds_kuberay_and_tries_the_rayjob(profile: Profile, site: Namespace) -> None:
    by_name = {check.name: check for check in checks(profile, run_in(site))}
    assert by_name["KubeRay"].outcome == by_name["the RayJob"].outcome == "ok", by_name
    assert by_name["right on rayjobs.ray.io"].outcome == "ok"
    assert by_name["KubeRay's operator"].outcome == "unknown"


def test_an_attempt_that_fails_and_one_that_succeeds(backend: KuberayBackend, site: Namespace) -> None:
    operator, first, second = Operator(site), f"{RUN}-aaaaa", f"{RUN}-bbbbb"
    backend.submit(run_in(site))
    assert backend.get(RUN).phase is Phase.QUEUED
    operator.write("Initializing", rayClusterName=first)
    operator.make_pods(first)
    until(lambda: len({p["spec"].get("nodeName") for p in site.pods()} - {None}) == 2, "two nodes taken")
    until(lambda: "2 of its 2 pods run" in backend.get(RUN).reason, "both pods to run")
    operator.write("Running", "RUNNING", rayClusterName=first)
    executing = backend.get(RUN)
    assert (executing.phase, executing.num_attempts) == (Phase.EXECUTING, 1)
    assert "gpu-0, gpu-1" in executing.reason
    assert list(backend.attempts(RUN)) == [1]
    assert backend.read_log(RUN, 1, 0) == f"{first}-head-abcde is up\n".encode()

    operator.write("Retrying", "FAILED", rayClusterName=first, failed=1, message=failed_with(1))
    assert backend.get(RUN).phase is Phase.BACKING_OFF
    assert [facts.exit_code for facts in backend.history(RUN)] == [1]
    operator.remove_pods(first)
    operator.write("Initializing", rayClusterName=second, failed=1, message="")
    operator.make_pods(second)
    operator.write("Running", "RUNNING", rayClusterName=second, failed=1)
    assert backend.get(RUN).num_charged == 1
    operator.write("Complete", "SUCCEEDED", rayClusterName=second, failed=1, succeeded=1, endTime=AT)
    assert backend.get(RUN).phase is Phase.COMPLETED
    assert {run: facts.phase for run, facts in backend.list().items()} == {RUN: Phase.COMPLETED}
    operator.remove_pods(second)


def test_cancel_and_a_generation_after_it(backend: KuberayBackend, site: Namespace) -> None:
    operator, cluster = Operator(site), f"{RUN}-aaaaa"
    backend.submit(run_in(site))
    operator.write("Running", "RUNNING", rayClusterName=cluster)
    operator.make_pods(cluster)
    assert backend.cancel(RUN, timeout_s=0.5).phase is Phase.STOPPING
    spec = operator.rayjob()["spec"]
    assert (spec["activeDeadlineSeconds"], spec["ttlSecondsAfterFinished"]) == (1, 0)
    operator.write("Failed", "RUNNING", rayClusterName=cluster, reason="DeadlineExceeded", failed=1)
    operator.remove_pods(cluster)
    assert backend.cancel(RUN, timeout_s=10).phase is Phase.CANCELLED
    assert backend.submit(run_in(site)) is True
    assert operator.rayjob(f"{RUN}-r2")["spec"]["activeDeadlineSeconds"] == 604800
    assert backend.get(RUN).phase is Phase.QUEUED


def test_suspend_and_resume(backend: KuberayBackend, site: Namespace) -> None:
    operator = Operator(site)
    backend.submit(run_in(site))
    operator.write("Running", "RUNNING", rayClusterName=f"{RUN}-aaaaa")
    assert backend.suspend(RUN, timeout_s=0.5).phase is Phase.STOPPING
    assert operator.rayjob()["spec"]["suspend"] is True
    operator.write("Suspended")
    assert backend.get(RUN).phase is Phase.SUSPENDED
    backend.resume(RUN)
    assert operator.rayjob()["spec"]["suspend"] is False


def test_a_missing_right_is_named(bench: Bench, site: Namespace) -> None:
    site.create_service_account("reader")
    site.grant("reader", [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "list"]},
                          {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]}])  # fmt: skip
    profile = Profile(
        name="bench", backend="kuberay", namespace=site.name,
        kubeconfig=site.service_account_kubeconfig("reader"),
    )  # fmt: skip
    by_name = {check.name: check for check in checks(profile, None)}
    assert by_name["right on rayjobs.ray.io"].detail.startswith("create, watch, patch in namespace")
    with pytest.raises(ApiForbidden, match="rayjobs"):
        KuberayBackend(profile).submit(run_in(site))
