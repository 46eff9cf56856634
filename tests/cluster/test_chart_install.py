"""The chart on a real API server: what each account may do then, and what is left after an uninstall."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.charts.conftest import CHART, Helm, run_helm
from tests.charts.rights import (
    KUBERAY_RIGHTS,
    KUEUE_RIGHTS,
    LAUNCHER_RIGHTS,
    NODE_RIGHTS,
    READER_RIGHTS,
    Rights,
)
from tests.cluster.bench.api import CORE, Api, ApiError, Json
from tests.cluster.bench.bench import Bench
from tests.cluster.bench.namespace import RBAC, Namespace
from tests.cluster.bench.waiting import until

VERSIONS = {"": "v1", "batch": "v1", "apps": "v1", "rbac.authorization.k8s.io": "v1", "ray.io": "v1",
            "kueue.x-k8s.io": "v1beta1"}  # fmt: skip
VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
#: What no account of the chart has any right to, beside the rights that the table knows.
ELSEWHERE = [
    ("", "secrets"),
    ("", "configmaps"),
    ("", "services"),
    ("", "pods/attach"),
    ("", "pods/portforward"),
    ("", "pods/eviction"),
    ("", "serviceaccounts/token"),
    ("batch", "cronjobs"),
    ("batch", "jobs/status"),
    ("apps", "deployments"),
    ("rbac.authorization.k8s.io", "roles"),
    ("rbac.authorization.k8s.io", "rolebindings"),
]
#: Says whether there is a token, and goes on until it is told to end.
SCRIPT = "ls /var/run/secrets 2>&1; trap 'exit 143' TERM; echo up; while :; do sleep 0.05; done"
RESOURCES = [*dict.fromkeys([*LAUNCHER_RIGHTS, *KUBERAY_RIGHTS, *KUEUE_RIGHTS, *READER_RIGHTS, *ELSEWHERE])]
EVERYTHING = "reader.enabled=true,nodeViewer.enabled=true,kuberay.enabled=true,kueue.enabled=true"


@dataclass(frozen=True, slots=True)
class Release:
    """The chart in a namespace of its own."""

    namespace: Namespace
    helm: Helm

    def upgrade(self, settings: str = "") -> str:
        """Installs, or changes what is installed; returns what helm says."""
        words = ["upgrade", "--install", "infl", CHART, "--namespace", self.namespace.name]
        return self.helm(*words, *(["--set", settings] if settings else [])).stdout

    def uninstall(self) -> None:
        self.helm("uninstall", "infl", "--namespace", self.namespace.name, "--wait")

    def as_account(self, name: str) -> Api:
        return Api(self.namespace.service_account_kubeconfig(name))


@pytest.fixture
def release(bench: Bench, namespace: Namespace, helm: Path, tmp_path: Path) -> Iterator[Release]:
    """Installed by an administrator with the chart's defaults."""
    release = Release(namespace, run_helm(helm, tmp_path, bench.kubeconfig))
    release.upgrade()
    yield release
    release.helm(
        "uninstall", "infl", "--namespace", namespace.name, check=False
    )  # what belongs to no namespace


def allowed(api: Api, namespace: str, group: str, resource: str, verb: str) -> bool:
    """Asks for the thing itself, so what answers is the API server's whole chain, not a review of it.

    Nothing of that name is there and bodies are empty, so a right shows as another refusal than 403.
    """
    root = f"/api/{VERSIONS[group]}" if not group else f"/apis/{group}/{VERSIONS[group]}"
    kind, _, subresource = resource.partition("/")
    collection = f"{root}/namespaces/{namespace}/{kind}" if namespace else f"{root}/{kind}"
    named = "/".join([collection, "nothing-of-this-name", *([subresource] if subresource else [])])
    try:
        match verb:
            case "get":
                # An exec without its parameters is refused for that, before anything is asked of a node.
                api.text(named)
            case "list" | "watch":
                query = {"watch": "1", "timeoutSeconds": "1"} if verb == "watch" else {}
                api.text(named if subresource else collection, limit="1", **query)
            case "create":
                api.create(named if subresource else collection, {})
            case "update":
                api._json("PUT", named, {})
            case "patch":
                api.patch(named, {})
            case "delete":
                api.delete(named)
            case "deletecollection":
                api.delete(collection, labelSelector="nothing=of-this-kind")
    except ApiError as error:
        return error.status != 403
    return True


def rights_found(api: Api, namespace: str) -> Rights:
    """What an account may do to the resources that are asked about, found by trying."""
    found: Rights = {}
    for (group, resource), verb in itertools.product(RESOURCES, VERBS):
        if "/" in resource and verb in ("list", "watch", "deletecollection"):
            continue  # there is no such request
        if allowed(api, namespace, group, resource, verb):
            found.setdefault((group, resource), set()).add(verb)
    return found


def test_the_launchers_token_may_do_what_the_launcher_does_and_nothing_else(release: Release) -> None:
    launcher = release.as_account("infl-launcher")
    assert rights_found(launcher, release.namespace.name) == LAUNCHER_RIGHTS
    assert rights_found(launcher, "default") == {}
    assert not allowed(launcher, "", "", "nodes", "list")


def test_more_is_allowed_when_it_is_asked_for(release: Release) -> None:
    said = release.upgrade(EVERYTHING)
    assert "launcher doctor --cluster lab" in said
    name = release.namespace.name
    launcher = release.as_account("infl-launcher")
    assert rights_found(launcher, name) == LAUNCHER_RIGHTS | KUBERAY_RIGHTS | KUEUE_RIGHTS
    assert {verb for verb in VERBS if allowed(launcher, "", "", "nodes", verb)} == NODE_RIGHTS["", "nodes"]
    reader = release.as_account("infl-reader")
    assert rights_found(reader, name) == READER_RIGHTS
    assert rights_found(reader, "default") == {}


def test_the_trainers_account_may_do_nothing(release: Release) -> None:
    release.upgrade(EVERYTHING)
    assert rights_found(release.as_account("infl-trainer"), release.namespace.name) == {}


def test_a_run_goes_its_way_with_the_launchers_rights_alone(release: Release) -> None:
    """Submit, watch, read the log, suspend, resume, cancel; the pod runs as the trainer, without a token."""
    namespace, launcher = release.namespace, release.as_account("infl-launcher")
    pod_spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 5,
        "serviceAccountName": "infl-trainer",
        "containers": [{"name": "trainer", "image": "any/image:1", "command": ["bash", "-c", SCRIPT]}],
    }
    body = {"metadata": {"name": "run"}, "spec": {"backoffLimit": 0, "template": {"spec": pod_spec}}}
    launcher.create(f"{namespace.batch}/jobs", body)
    pod = namespace.running_pod("run")
    assert not [v for v in pod["spec"].get("volumes", []) if "projected" in v], "no token is mounted"
    path = f"{namespace.batch}/jobs/run"
    log = f"{namespace.core}/pods/{pod['metadata']['name']}/log"
    until(lambda: "up" in launcher.text(log), "the log")
    assert launcher.items(f"{namespace.core}/events")
    launcher.patch(path, {"spec": {"suspend": True}})
    until(lambda: not launcher.items(f"{namespace.core}/pods"), "no pod while suspended")
    launcher.patch(path, {"spec": {"suspend": False}})
    namespace.running_pod("run")
    launcher.patch(path, {"spec": {"activeDeadlineSeconds": 1}})
    namespace.wait_for_condition("run", "Failed")
    with pytest.raises(ApiError) as refused:
        launcher.delete(path)
    assert (refused.value.status, refused.value.reason) == (403, "Forbidden")


def test_the_launcher_works_with_those_rights_and_the_profile_of_the_notes(
    release: Release, tmp_path: Path
) -> None:
    """A token of the launcher's account, the profile pasted from NOTES, and the commands of a run's life."""
    config = tmp_path / "launcher.yaml"
    config.write_text(release.upgrade().split("# --- launcher.yaml\n")[1].split("\n# ---")[0])
    environment = {
        "KUBECONFIG": str(release.namespace.service_account_kubeconfig("infl-launcher")),
        "PATH": "",  # without git the code is what is installed, which needs no commit
        "HOME": str(tmp_path),
        "PYTHONPATH": str(CHART.parents[1]),
        "INFL_CLUSTER": "lab",
        "INFL_CONFIG": str(config),
    }

    def launcher(*words: str) -> Json:
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *words, "--output", "json"],
            env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answer: Json = json.loads(done.stdout)
        return answer

    def state() -> str:
        return str(launcher("status", "one")["state"])

    submit = ("submit", "--preset", "smoke", "--overlay", "tiny-cpu", "--name", "one")
    launcher(*submit)
    created = release.namespace.job("one")
    launcher(*submit)
    assert release.namespace.job("one")["metadata"]["uid"] == created["metadata"]["uid"], "adopted"
    assert created["spec"]["template"]["spec"]["serviceAccountName"] == "infl-trainer"
    until(lambda: state() == "PENDING", "the claim that nothing provides keeps the pod waiting")
    until(lambda: launcher("events", "one"), "an event")
    launcher("explain", "one")
    launcher("suspend", "one")
    assert state() == "SUSPENDED"
    launcher("resume", "one")
    launcher("cancel", "one")
    assert state() == "CANCELLED"
    assert release.namespace.job("one")["metadata"]["uid"] == created["metadata"]["uid"], "nothing is deleted"


def test_the_claim_outlives_the_release_and_comes_back_to_it(release: Release) -> None:
    namespace = release.namespace
    claim = f"{namespace.core}/persistentvolumeclaims/infl-artifacts"
    before = namespace.api.get(claim)["metadata"]["uid"]
    release.uninstall()
    assert namespace.api.get(claim)["metadata"]["uid"] == before
    assert namespace.api.find(f"{namespace.core}/serviceaccounts/infl-launcher") is None
    assert namespace.api.items(f"{RBAC}/namespaces/{namespace.name}/roles") == []
    release.upgrade()
    assert namespace.api.get(claim)["metadata"]["uid"] == before


def test_another_release_is_refused_what_the_first_one_owns(release: Release) -> None:
    words = ["install", "second", CHART, "--namespace", release.namespace.name]
    done = release.helm(*words, check=False)
    assert done.returncode != 0
    assert "infl-artifacts" in done.stderr or "infl-launcher" in done.stderr


def test_queues_are_taken_by_their_own_definitions(bench: Bench, release: Release) -> None:
    bench.apply_crds("kai")
    bench.apply_crds("kueue")
    queue = f"queue-{release.namespace.name}"
    settings = (
        f"kai.queue.create=true,kai.queue.name={queue},"
        "kueue.enabled=true,kueue.localQueue.create=true,kueue.localQueue.clusterQueue=gpu-cluster"
    )
    release.upgrade(settings)
    api, namespace = release.namespace.api, release.namespace.name
    made: Json = api.get(f"/apis/scheduling.run.ai/v2/queues/{queue}")
    assert made["spec"]["resources"]["gpu"] == {"quota": 8, "limit": 16, "overQuotaWeight": 1}
    path = f"/apis/kueue.x-k8s.io/v1beta1/namespaces/{namespace}/localqueues"
    (local,) = api.items(path)
    assert local["spec"]["clusterQueue"] == "gpu-cluster"
    assert release.as_account("infl-launcher").items(path) == [local]


def test_pods_of_runs_fit_the_restricted_standard(release: Release) -> None:
    """NOTES says that the namespace may enforce it: the shipped Job's pod is admitted, a root pod is not."""
    import yaml

    namespace = release.namespace
    label = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    namespace.api.patch(f"{CORE}/namespaces/{namespace.name}", label)
    golden = Path(__file__).parents[1] / "launcher" / "golden" / "kubernetes" / "alltoken-timing.yaml"
    template = yaml.safe_load(golden.read_text())["spec"]["template"]
    pod = {"metadata": {"generateName": "run-"}, "spec": template["spec"]}

    def admitted() -> bool:
        try:
            namespace.api._json("POST", f"{namespace.core}/pods", pod, query={"dryRun": "All"})
        except ApiError as error:
            assert "PodSecurity" in error.message, error.message
            return False
        return True

    assert admitted()
    pod["spec"]["securityContext"].pop("runAsNonRoot")
    until(lambda: not admitted(), "the standard is enforced", timeout_s=10)
