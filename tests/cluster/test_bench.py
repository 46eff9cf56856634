"""The bench behaves as Kubernetes does where launcher tests rely on it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from kubernetes import client, config
from kubernetes.stream import stream
from kubernetes.stream.ws_client import WSClient

from tests.cluster.bench.api import CORE, Api, ApiError, Json
from tests.cluster.bench.bench import Bench
from tests.cluster.bench.namespace import Namespace
from tests.cluster.bench.processes import carrying
from tests.cluster.bench.waiting import until
from tests.cluster.jobs import GPU_RESOURCE, UNTIL_TERMINATED, job

FAIL_ON_42 = {
    "rules": [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "In", "values": [42]}},
    ]
}


def create(namespace: Namespace, body: Json) -> None:
    namespace.api.create(f"{namespace.batch}/jobs", body)


def terminated(pod: Json, container: str = "main") -> Json:
    statuses = pod["status"]["containerStatuses"]
    state: Json = next(s for s in statuses if s["name"] == container)["state"]["terminated"]
    return state


def uids(namespace: Namespace, name: str) -> set[str]:
    return {pod["metadata"]["uid"] for pod in namespace.job_pods(name)}


def log(namespace: Namespace, pod: Json, **query: str) -> str:
    return namespace.api.text(f"{namespace.core}/pods/{pod['metadata']['name']}/log", **query)


# What becomes of a Job


def test_a_job_runs_on_a_gpu_node_and_completes(namespace: Namespace) -> None:
    create(namespace, job("done", "echo hello; exit 0", num_gpus=8))
    assert namespace.wait_for_condition("done", "Complete", "Failed")["type"] == "Complete"
    (pod,) = namespace.job_pods("done")
    assert pod["status"]["phase"] == "Succeeded"
    assert pod["spec"]["nodeName"].startswith("gpu-")
    assert terminated(pod)["reason"] == "Completed"
    assert log(namespace, pod) == "hello\n"


def test_a_failure_is_retried_to_the_limit(namespace: Namespace) -> None:
    create(namespace, job("retried", "exit 3", backoffLimit=2))
    assert namespace.wait_for_condition("retried", "Failed")["reason"] == "BackoffLimitExceeded"
    assert [terminated(pod)["exitCode"] for pod in namespace.job_pods("retried")] == [3, 3, 3]


def test_an_exit_code_of_the_failure_policy_fails_the_job_at_once(namespace: Namespace) -> None:
    create(namespace, job("fatal", "exit 42", backoffLimit=5, podFailurePolicy=FAIL_ON_42))
    assert namespace.wait_for_condition("fatal", "Failed")["reason"] == "PodFailurePolicy"
    assert len(namespace.job_pods("fatal")) == 1


def test_suspending_ends_the_pod_and_resuming_starts_another(namespace: Namespace) -> None:
    create(namespace, job("paused", UNTIL_TERMINATED))
    first = namespace.running_pod("paused")
    path = f"{namespace.batch}/jobs/paused"
    namespace.api.patch(path, {"spec": {"suspend": True}})
    until(lambda: not namespace.job_pods("paused"), "no pod while suspended")
    namespace.wait_for_condition("paused", "Suspended")
    assert namespace.job("paused")["status"].get("failed", 0) == 0
    namespace.api.patch(path, {"spec": {"suspend": False}})
    assert namespace.running_pod("paused")["metadata"]["uid"] != first["metadata"]["uid"]


def test_an_eviction_that_is_ignored_is_not_counted(namespace: Namespace) -> None:
    create(namespace, job("evicted", UNTIL_TERMINATED, podFailurePolicy=FAIL_ON_42))
    first = namespace.running_pod("evicted")
    namespace.evict(first["metadata"]["name"])

    def replaced() -> bool:
        return namespace.running_pod("evicted")["metadata"]["uid"] != first["metadata"]["uid"]

    until(replaced, "another pod")
    assert namespace.job("evicted")["status"].get("failed", 0) == 0


def test_a_pod_that_ignores_sigterm_is_killed_after_its_grace_period(namespace: Namespace) -> None:
    stubborn = "trap '' TERM; echo up; while :; do sleep 0.05; done"
    body = job("stubborn", stubborn, pod={"terminationGracePeriodSeconds": 1})
    create(namespace, body | {"metadata": {"name": "stubborn", "finalizers": ["bench/hold"]}})
    pod = namespace.running_pod("stubborn")
    pid = namespace.process_id(pod, "main")
    namespace.api.delete(f"{namespace.core}/pods/{pod['metadata']['name']}")
    until(lambda: not Path(f"/proc/{pid}").exists(), "the process gone")
    namespace.api.patch(f"{namespace.batch}/jobs/stubborn", {"metadata": {"finalizers": None}})


def test_a_killed_process_looks_like_one_that_ran_out_of_memory(namespace: Namespace) -> None:
    create(namespace, job("eaten", UNTIL_TERMINATED))
    os.kill(namespace.process_id(namespace.running_pod("eaten"), "main"), signal.SIGKILL)
    namespace.wait_for_condition("eaten", "Failed")
    (pod,) = namespace.job_pods("eaten")
    assert (terminated(pod)["exitCode"], terminated(pod)["reason"]) == (137, "OOMKilled")


def test_an_image_that_cannot_be_pulled_keeps_the_pod_waiting(namespace: Namespace) -> None:
    create(namespace, job("imageless", "exit 0", pod={"container": {"image": "missing/image:1"}}))

    def reason() -> str:
        statuses = [p["status"].get("containerStatuses", []) for p in namespace.job_pods("imageless")]
        return "".join(s["state"].get("waiting", {}).get("reason", "") for pod in statuses for s in pod)

    until(lambda: reason() == "ErrImagePull", "ErrImagePull", every_s=0.02)
    until(lambda: reason() == "ImagePullBackOff", "ImagePullBackOff", every_s=0.02)
    (pod,) = namespace.job_pods("imageless")
    assert pod["status"]["phase"] == "Pending"


def test_a_pod_that_finds_no_gpus_says_so_in_the_schedulers_words(namespace: Namespace) -> None:
    create(namespace, job("greedy", "exit 0", num_gpus=9))

    def words() -> str:
        conditions = [c for p in namespace.job_pods("greedy") for c in p["status"].get("conditions", [])]
        return "".join(c.get("message", "") for c in conditions if c["type"] == "PodScheduled")

    assert f"Insufficient {GPU_RESOURCE}" in until(words, "the scheduler's words")


def test_a_quota_refuses_a_pod_and_the_job_says_so(namespace: Namespace) -> None:
    namespace.create_quota("gpus", {f"requests.{GPU_RESOURCE}": "4"})
    create(namespace, job("over", "exit 0", num_gpus=8))

    def refusals() -> list[str]:
        events = namespace.api.items(f"{namespace.core}/events", fieldSelector="involvedObject.name=over")
        return [e["message"] for e in events if e["reason"] == "FailedCreate"]

    assert "exceeded quota: gpus" in until(refusals, "FailedCreate")[0]


def test_a_higher_priority_preempts(bench: Bench, namespace: Namespace) -> None:
    bench.add_node("contested", labels={"pool": "contested"})
    bench.create_priority("low", 1)
    bench.create_priority("high", 1000)

    def prioritised(name: str) -> Json:
        pod = {"priorityClassName": name, "nodeSelector": {"pool": "contested"}}
        return job(name, UNTIL_TERMINATED, num_gpus=8, pod=pod, podFailurePolicy=FAIL_ON_42)

    try:
        create(namespace, prioritised("low"))
        first = namespace.running_pod("low")
        create(namespace, prioritised("high"))
        namespace.running_pod("high")
        until(lambda: first["metadata"]["uid"] not in uids(namespace, "low"), "the preempted pod gone")
        assert namespace.job("low")["status"].get("failed", 0) == 0
    finally:
        bench.remove_node("contested")


# What a container sees


def test_a_container_has_the_environment_that_its_pod_describes(namespace: Namespace) -> None:
    namespace.create_secret("keys", {"token": "s3cret"})
    environment = [
        {"name": "PLAIN", "value": "one"},
        {"name": "REFERS", "value": "$(PLAIN) $$(PLAIN) $(ABSENT) $5"},
        {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "JOB", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['job-name']"}}},
        {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "token"}}},
        {"name": "NONE", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "no", "optional": True}}},
        {"name": "OUT", "value": "/artifacts/run"},
        {"name": "TEXT", "value": '{"out": "/artifacts/run"}'},
    ]
    folder = namespace.create_claim("results")
    program = "import json, os, sys; print(json.dumps([dict(os.environ), sys.argv[1:]]))"
    container = {
        "command": ["python", "-c", program],
        "args": ["--out", "/artifacts/run", "--log=/artifacts/log", "/artifactsy", "$(PLAIN)"],
        "env": environment,
        "volumeMounts": [{"name": "out", "mountPath": "/artifacts"}],
    }
    volumes = [{"name": "out", "persistentVolumeClaim": {"claimName": "results"}}]
    create(namespace, job("seen", "", pod={"container": container, "volumes": volumes}))
    namespace.wait_for_condition("seen", "Complete")
    (pod,) = namespace.job_pods("seen")
    seen, arguments = json.loads(log(namespace, pod))
    assert {name: seen.get(name) for name in ("PLAIN", "REFERS", "POD", "NODE", "JOB", "TOKEN", "NONE")} == {
        "PLAIN": "one",
        "REFERS": "one $(PLAIN) $(ABSENT) $5",
        "POD": pod["metadata"]["name"],
        "NODE": pod["spec"]["nodeName"],
        "JOB": "seen",
        "TOKEN": "s3cret",
        "NONE": None,
    }
    assert (seen["OUT"], seen["TEXT"]) == (f"{folder}/run", '{"out": "/artifacts/run"}')
    assert arguments == ["--out", f"{folder}/run", f"--log={folder}/log", "/artifactsy", "one"]
    assert "HOME" in seen and "KUBECONFIG" not in seen


def test_a_secret_that_is_missing_holds_the_container_until_it_is_there(namespace: Namespace) -> None:
    reference = {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "later", "key": "key"}}}
    create(namespace, job("held", 'test "$KEY" = here', pod={"container": {"env": [reference]}}))

    def waiting() -> list[str]:
        statuses = [s for p in namespace.job_pods("held") for s in p["status"].get("containerStatuses", [])]
        return [s["state"]["waiting"]["reason"] for s in statuses if "waiting" in s["state"]]

    until(lambda: waiting() == ["CreateContainerConfigError"], "CreateContainerConfigError")
    namespace.create_secret("later", {"key": "here"})
    namespace.wait_for_condition("held", "Complete")


def test_a_sidecar_runs_beside_and_ends_after(namespace: Namespace) -> None:
    sidecar = {
        "name": "beside",
        "image": "bench/image:1",
        "command": ["bash", "-c", "trap 'echo told; exit 0' TERM; echo up; while :; do sleep 0.05; done"],
        "restartPolicy": "Always",
    }
    create(namespace, job("pair", "sleep 0.3; echo main", pod={"initContainers": [sidecar]}))
    namespace.wait_for_condition("pair", "Complete")
    (pod,) = namespace.job_pods("pair")
    assert log(namespace, pod, container="beside") == "up\ntold\n"
    assert log(namespace, pod, container="main") == "main\n"


def test_nothing_that_a_container_started_outlives_it(namespace: Namespace) -> None:
    create(namespace, job("parent", "setsid sleep 1000 & echo $!"))
    namespace.wait_for_condition("parent", "Complete")
    (pod,) = namespace.job_pods("parent")
    assert not Path(f"/proc/{int(log(namespace, pod))}").exists()


# Logs and exec


def test_logs_are_read_whole_in_part_and_as_they_come(namespace: Namespace) -> None:
    script = "for i in 1 2 3; do echo line $i; done; read < go; echo line 4; printf unfinished"
    create(namespace, job("talks", f"mkfifo go; {script}"))
    pod = namespace.running_pod("talks")
    until(lambda: "line 3" in log(namespace, pod), "three lines")
    assert log(namespace, pod) == "line 1\nline 2\nline 3\n"
    assert log(namespace, pod, tailLines="1") == "line 3\n"
    assert log(namespace, pod, limitBytes="8") == "line 1\nl"
    stamped = log(namespace, pod, timestamps="true").splitlines()
    assert [line.split(" ", 1)[1] for line in stamped] == ["line 1", "line 2", "line 3"]
    since = stamped[1].split(" ")[0]
    # Kubernetes cuts a time to whole seconds, so that lines of the same second come again.
    assert log(namespace, pod, sinceTime=since).endswith("line 2\nline 3\n")

    followed: list[str] = []
    follower = threading.Thread(target=lambda: followed.append(log(namespace, pod, follow="true")))
    follower.start()
    fifo = next(Path(f"/proc/{namespace.process_id(pod, 'main')}/cwd").glob("go"))
    fifo.write_text("\n")
    follower.join(30)
    assert followed == ["line 1\nline 2\nline 3\nline 4\nunfinished"]
    assert log(namespace, pod) == followed[0]  # the same when it has ended


def open_exec(bench: Bench, namespace: Namespace, pod: Json, script: str) -> WSClient:
    api = client.CoreV1Api(config.new_client_from_config(str(bench.kubeconfig)))
    return stream(
        api.connect_get_namespaced_pod_exec,
        pod["metadata"]["name"],
        namespace.name,
        command=["bash", "-c", script],
        stdin=True,
        stdout=True,
        stderr=True,
        tty=False,
        _preload_content=False,
    )


def test_exec_passes_both_ways_and_tells_the_exit_code(bench: Bench, namespace: Namespace) -> None:
    create(namespace, job("open", UNTIL_TERMINATED))
    script = "echo out; echo err >&2; read word; echo got $word; exit 7"
    connection = open_exec(bench, namespace, namespace.running_pod("open"), script)
    connection.write_stdin("there\n")
    connection.run_forever(timeout=20)
    assert connection.read_stdout() == "out\ngot there\n"
    assert connection.read_stderr() == "err\n"
    assert connection.returncode == 7


def test_exec_fails_when_its_container_ends(bench: Bench, namespace: Namespace) -> None:
    create(namespace, job("brief", UNTIL_TERMINATED))
    pod = namespace.running_pod("brief")
    connection = open_exec(bench, namespace, pod, "trap '' HUP TERM; while :; do sleep 0.05; done")
    os.kill(namespace.process_id(pod, "main"), signal.SIGTERM)
    connection.run_forever(timeout=20)
    assert connection.returncode == 137


# Faults


def test_a_lost_nodes_pod_stays_terminating_until_the_node_comes_back(
    bench: Bench, namespace: Namespace
) -> None:
    bench.add_node("doomed", labels={"pool": "doomed"})
    pod_spec = {"nodeSelector": {"pool": "doomed"}}
    create(namespace, job("lost", UNTIL_TERMINATED, pod=pod_spec, podFailurePolicy=FAIL_ON_42))
    pod = namespace.running_pod("lost")
    path = f"{namespace.core}/pods/{pod['metadata']['name']}"
    pid = namespace.process_id(pod, "main")
    try:
        bench.lose_node("doomed")
        until(lambda: "deletionTimestamp" in namespace.api.get(path)["metadata"], "the pod marked")
        assert Path(f"/proc/{pid}").exists()
        left = namespace.api.get(path)
        assert left["status"]["phase"] == "Running"
        assert uids(namespace, "lost") == {pod["metadata"]["uid"]}
        bench.find_node("doomed")
        until(lambda: not Path(f"/proc/{pid}").exists(), "the process gone")
        assert namespace.running_pod("lost")["metadata"]["uid"] != pod["metadata"]["uid"]
        assert namespace.job("lost")["status"].get("failed", 0) == 0
    finally:
        bench.remove_node("doomed")


def test_everything_goes_on_after_the_api_server_was_killed(bench: Bench, namespace: Namespace) -> None:
    create(namespace, job("survivor", "mkfifo go; echo up; read < go; exit 0"))
    pod = namespace.running_pod("survivor")
    fifo = Path(f"/proc/{namespace.process_id(pod, 'main')}/cwd/go")
    until(fifo.exists, "the fifo")
    with bench.apiserver_killed():
        with pytest.raises(ConnectionError):
            bench.api.get(f"{CORE}/nodes")
        fifo.write_text("\n")  # the container ends while nobody can be told
    assert namespace.wait_for_condition("survivor", "Complete", "Failed")["type"] == "Complete"
    create(namespace, job("later", "exit 0"))
    namespace.wait_for_condition("later", "Complete")


def test_a_service_account_may_do_what_it_was_granted_and_no_more(namespace: Namespace) -> None:
    namespace.create_service_account("watcher")
    namespace.grant("watcher", [{"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["list"]}])
    api = Api(namespace.service_account_kubeconfig("watcher"))
    assert api.items(f"{namespace.batch}/jobs") == []
    with pytest.raises(ApiError, match=r'403 Forbidden.*cannot list resource "pods"'):
        api.items(f"{namespace.core}/pods")


def test_custom_resources_are_checked_by_their_crds(bench: Bench, namespace: Namespace) -> None:
    bench.apply_crds("kuberay")
    path = f"/apis/ray.io/v1/namespaces/{namespace.name}/rayjobs"
    good = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "good"},
        "spec": {"entrypoint": "x"},
    }
    assert namespace.api.create(path, good)["spec"]["entrypoint"] == "x"
    bad = {**good, "metadata": {"name": "bad"}, "spec": {"entrypoint": 7}}
    with pytest.raises(ApiError, match=r"422 Invalid.*spec\.entrypoint"):
        namespace.api.create(path, bad)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_session_that_used_it(
    bench: Bench, tmp_path: Path, end: signal.Signals
) -> None:
    """However it ends. ``bench`` is asked for so that this is skipped where there is no control plane."""
    program = (
        "import sys, time; from pathlib import Path\n"
        "from tests.cluster.bench.bench import Bench; from tests.cluster.jobs import job\n"
        "bench = Bench(Path(sys.argv[1])); bench.add_node('only')\n"
        "with bench.namespace() as namespace:\n"
        "    body = job('left', 'setsid sleep 1000 & sleep 1000')\n"
        "    namespace.api.create(f'{namespace.batch}/jobs', body); namespace.running_pod('left')\n"
        "    print('up', flush=True); time.sleep(1000)\n"
    )
    session = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE)
    assert session.stdout is not None and session.stdout.readline() == b"up\n"
    assert len(ours(tmp_path)) >= 6
    session.send_signal(end)
    session.wait()
    until(lambda: not ours(tmp_path), "no process left", timeout_s=30)


def ours(folder: Path) -> list[int]:
    """The processes that name the folder in their command or carry it as a pod's."""
    named = []
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes() if process.name.isdigit() else b""
        except OSError:
            continue
        if str(folder).encode() in words:
            named.append(int(process.name))
    return list(itertools.chain(named, carrying("INFL_BENCH_POD", f"{folder}/")))
