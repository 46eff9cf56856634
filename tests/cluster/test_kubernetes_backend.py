"""The backend on a real control plane: the API, the Job controller and the scheduler are Kubernetes' own.

The pods run a shell script in place of the trainer; everything else of the Job is what the launcher renders.
"""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from influence.rundir import ConflictError, RunSpec
from influence.rundir.exits import Verdict
from launcher import errors
from launcher.backends.kubernetes import KubernetesBackend
from launcher.backends.kubernetes_api import KubernetesApi
from launcher.errors import BackendError
from launcher.profiles import Profile
from launcher.states import BackendFacts, Phase
from tests.cluster.bench.api import tolerated
from tests.cluster.bench.bench import Bench
from tests.cluster.bench.namespace import Namespace
from tests.cluster.bench.waiting import until
from tests.launcher.test_render_job import run_of

UNTIL_TERMINATED = "trap 'echo bye; exit 75' TERM; echo up; while :; do sleep 0.05; done"
GPU_RUN = "infl-smoke-0221"
PRIORITY_CLASSES = "/apis/scheduling.k8s.io/v1/priorityclasses"
SMALL = ("hardware.cpus=1", "hardware.memory=1Gi", "hardware.shared_memory=1Gi", "retry.grace_period_s=5")


class ScriptedApi(KubernetesApi):
    """Replaces what the pods execute, and nothing else."""

    def __init__(self, profile: Profile, script: str) -> None:
        super().__init__(profile)
        self.script = script
        self.calls: list[str] = []

    def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        container = body["spec"]["template"]["spec"]["containers"][0]
        container |= {"command": ["bash", "-c", self.script], "args": []}
        return super().create(path, body)

    def list(self, path: str, **query: str | int) -> dict[str, Any]:
        self.calls.append(path.rpartition("/")[2])
        return super().list(path, **query)


@pytest.fixture
def prepared(namespace: Namespace) -> Namespace:
    """What the chart prepares in a namespace."""
    namespace.create_claim("infl-artifacts")
    namespace.create_service_account("infl-trainer")
    return namespace


def profile_of(bench: Bench, namespace: Namespace, kubeconfig: Path | None = None) -> Profile:
    return Profile(
        name="bench", backend="kubernetes", namespace=namespace.name,
        kubeconfig=kubeconfig or bench.kubeconfig,
    )  # fmt: skip


def backend_of(bench: Bench, namespace: Namespace, script: str) -> KubernetesBackend:
    profile = profile_of(bench, namespace)
    return KubernetesBackend(profile, ScriptedApi(profile, script))


def run_in(namespace: Namespace, *sets: str) -> RunSpec:
    return run_of("smoke", (), f"cluster.namespace={namespace.name}", *SMALL, *sets)


def phase_of(backend: KubernetesBackend, *phases: Phase, timeout_s: float = 60) -> BackendFacts:
    """The run's facts once it has one of the phases."""

    def facts() -> BackendFacts | None:
        now = backend.get(GPU_RUN)
        return now if now.phase in phases else None

    return until(facts, f"{GPU_RUN} {phases}", timeout_s=timeout_s)


def is_refused(facts: BackendFacts, reason: str) -> BackendFacts | None:
    return facts if facts.reason is not None and facts.reason.startswith(reason) else None


def log_of(backend: KubernetesBackend, attempt: int) -> bytes:
    text = b""
    while piece := backend.read_log(GPU_RUN, attempt, len(text)):
        text += piece
    return text


def test_a_run_goes_from_submit_to_completed(bench: Bench, prepared: Namespace) -> None:
    backend = backend_of(bench, prepared, "echo hello; sleep 3; echo bye")
    run = run_in(prepared)
    assert backend.get(GPU_RUN).phase is Phase.ABSENT
    assert backend.document(GPU_RUN) is None
    assert backend.submit(run) is True
    assert backend.document(GPU_RUN) == run
    executing = phase_of(backend, Phase.EXECUTING)
    # The node is named where the pods were asked for: while the Job itself has not counted it as ready.
    assert executing.reason == "its pod runs" or "on node gpu-" in executing.reason
    facts = phase_of(backend, Phase.COMPLETED)
    assert facts.document == run
    assert (facts.num_charged, facts.num_attempts) == (0, 1)
    assert backend.attempts(GPU_RUN) == [1]
    assert log_of(backend, 1) == b"hello\nbye\n"
    (attempt,) = backend.history(GPU_RUN)
    assert (attempt.exit_code, attempt.verdict, attempt.decision) == (0, Verdict.DONE, "the run is complete")
    assert "SuccessfulCreate" in [event.reason for event in backend.events(GPU_RUN)]
    assert backend.cancel(GPU_RUN).phase is Phase.COMPLETED


def test_two_submits_at_once_make_one_job(bench: Bench, prepared: Namespace) -> None:
    backends = [backend_of(bench, prepared, UNTIL_TERMINATED) for _ in range(6)]
    run = run_in(prepared)
    with ThreadPoolExecutor(len(backends)) as pool:
        started = list(pool.map(lambda backend: backend.submit(run), backends))
    assert sorted(started) == [False] * 5 + [True]
    assert len(prepared.api.items(f"{prepared.batch}/jobs")) == 1
    with pytest.raises(ConflictError) as caught:
        backends[0].submit(run_in(prepared, "training.total_steps=9"))
    assert caught.value.difference == ["training.total_steps: 1 -> 9"]


def test_charged_failures_are_retried_to_the_limit_and_told(bench: Bench, prepared: Namespace) -> None:
    backend = backend_of(bench, prepared, "echo attempt; exit 3")
    backend.submit(run_in(prepared, "retry.backoff_limit=2"))
    facts = phase_of(backend, Phase.FAILED)
    assert facts.reason == "all 2 retries are used up; the last attempt: failed (exit code 3)"
    assert (facts.num_charged, facts.num_attempts) == (2, 3)
    history = backend.history(GPU_RUN)
    assert [a.exit_code for a in history] == [3, 3, 3]
    assert [a.number for a in history] == [1, 2, 3]
    assert {a.verdict for a in history} == {Verdict.CHARGED_RETRY}
    assert [a.decision for a in history][:2] == [
        "started again, charged: retry 1 of 2", "started again, charged: retry 2 of 2",
    ]  # fmt: skip
    assert str(history[2].decision).startswith("not started again: all 2 retries are used up")
    assert [log_of(backend, number) for number in backend.attempts(GPU_RUN)] == [b"attempt\n"] * 3


def test_a_configuration_error_is_not_retried(bench: Bench, prepared: Namespace) -> None:
    backend = backend_of(bench, prepared, "exit 78")
    backend.submit(run_in(prepared))
    facts = phase_of(backend, Phase.FAILED)
    assert facts.reason == "configuration error (78), which is not worth a retry"
    (attempt,) = backend.history(GPU_RUN)
    assert attempt.verdict is Verdict.FATAL
    assert attempt.decision == f"not started again: {facts.reason}"


def test_an_eviction_and_a_sigterm_are_not_charged(bench: Bench, prepared: Namespace) -> None:
    backend = backend_of(bench, prepared, UNTIL_TERMINATED)
    backend.submit(run_in(prepared, "retry.backoff_limit=0"))
    first = prepared.running_pod(GPU_RUN)["metadata"]["name"]
    prepared.evict(first)

    def replaced() -> bool:
        pods = [p for p in prepared.job_pods(GPU_RUN) if p["metadata"]["name"] != first]
        return bool(pods) and pods[0]["status"].get("phase") == "Running"

    until(replaced, "another pod")
    facts = phase_of(backend, Phase.EXECUTING)
    assert facts.num_charged == 0
    evicted, replacement = backend.history(GPU_RUN)  # the first is gone: its events tell
    assert (evicted.pod, evicted.number) == (first, 1)
    assert "evicted" in str(evicted.ended_by)
    assert (evicted.verdict, evicted.decision) == (Verdict.FREE_RETRY, "not charged")
    assert (replacement.number, replacement.ended_by) == (2, None)


def test_a_kill_counts_as_out_of_memory_or_a_kill(bench: Bench, prepared: Namespace) -> None:
    backend = backend_of(bench, prepared, "kill -KILL $BASHPID")
    backend.submit(run_in(prepared, "retry.backoff_limit=0"))
    facts = phase_of(backend, Phase.FAILED)
    assert facts.reason.startswith("no retry is allowed; the last attempt: ")
    assert "(137)" in facts.reason and "out of memory" in facts.reason


def test_suspend_gives_the_node_back_and_resume_goes_on(bench: Bench, prepared: Namespace) -> None:
    backend = backend_of(bench, prepared, UNTIL_TERMINATED)
    backend.submit(run_in(prepared, "retry.backoff_limit=0"))
    prepared.running_pod(GPU_RUN)
    facts = backend.suspend(GPU_RUN)
    assert (facts.phase, facts.num_charged) == (Phase.SUSPENDED, 0)
    assert not [pod for pod in prepared.job_pods(GPU_RUN) if pod["status"]["phase"] == "Running"]
    assert backend.suspend(GPU_RUN).phase is Phase.SUSPENDED
    assert backend.submit(run_in(prepared, "retry.backoff_limit=0")) is False
    assert backend.resume(GPU_RUN).phase is not Phase.SUSPENDED
    prepared.running_pod(GPU_RUN)
    assert phase_of(backend, Phase.EXECUTING).num_charged == 0
    assert backend.resume(GPU_RUN).phase is Phase.EXECUTING


def test_cancel_ends_the_pod_and_keeps_the_job(bench: Bench, prepared: Namespace) -> None:
    backend = backend_of(bench, prepared, UNTIL_TERMINATED)
    run = run_in(prepared)
    backend.submit(run)
    prepared.running_pod(GPU_RUN)
    assert backend.cancel(GPU_RUN, timeout_s=0).phase in (Phase.STOPPING, Phase.EXECUTING)
    assert backend.cancel(GPU_RUN).phase is Phase.CANCELLED
    assert prepared.job(GPU_RUN)["metadata"]["annotations"]["infl/cancelled-at"]
    assert not [pod for pod in prepared.job_pods(GPU_RUN) if pod["status"]["phase"] == "Running"]
    assert backend.cancel(GPU_RUN).phase is Phase.CANCELLED
    assert backend.submit(run) is True  # the next generation
    assert prepared.job(f"{GPU_RUN}-r2")
    prepared.running_pod(f"{GPU_RUN}-r2")
    facts = phase_of(backend, Phase.EXECUTING)
    assert f"pod {GPU_RUN}-r2-" in facts.reason
    assert backend.submit(run) is False


def test_a_suspended_run_can_be_cancelled(bench: Bench, prepared: Namespace) -> None:
    backend = backend_of(bench, prepared, UNTIL_TERMINATED)
    backend.submit(run_in(prepared))
    backend.suspend(GPU_RUN)
    assert backend.cancel(GPU_RUN).phase is Phase.CANCELLED
    assert backend.resume(GPU_RUN).phase is Phase.CANCELLED
    assert prepared.job(GPU_RUN)["spec"]["suspend"] is True


def test_two_submits_of_a_run_that_failed_make_one_next_generation(bench: Bench, prepared: Namespace) -> None:
    backend = backend_of(bench, prepared, "exit 78")
    run = run_in(prepared)
    backend.submit(run)
    phase_of(backend, Phase.FAILED)
    backends = [backend_of(bench, prepared, UNTIL_TERMINATED) for _ in range(6)]
    with ThreadPoolExecutor(len(backends)) as pool:
        started = list(pool.map(lambda backend: backend.submit(run), backends))
    assert sorted(started) == [False] * 5 + [True]
    names = {job["metadata"]["name"] for job in prepared.api.items(f"{prepared.batch}/jobs")}
    assert names == {GPU_RUN, f"{GPU_RUN}-r2"}
    phase_of(backend, Phase.EXECUTING)
    first, second = backend.history(GPU_RUN)
    assert (first.number, first.exit_code, second.number, second.exit_code) == (1, 78, 2, None)


@pytest.mark.parametrize("propagation", ["Background", "Orphan", "Foreground"])
def test_no_second_pod_beside_that_of_a_job_that_was_deleted(
    bench: Bench, prepared: Namespace, propagation: str
) -> None:
    backend = backend_of(bench, prepared, "trap '' TERM; echo up; while :; do sleep 0.05; done")
    run = run_in(prepared, "retry.grace_period_s=20")
    backend.submit(run)
    pod = prepared.running_pod(GPU_RUN)["metadata"]["name"]
    prepared.api.delete(f"{prepared.batch}/jobs/{GPU_RUN}", propagationPolicy=propagation)
    if propagation != "Foreground":
        until(lambda: not prepared.api.items(f"{prepared.batch}/jobs"), "the Job gone")
    facts = phase_of(backend, Phase.EXECUTING if propagation == "Orphan" else Phase.STOPPING)
    assert facts.document == run
    if propagation == "Foreground":
        assert "being deleted" in facts.reason
    else:
        assert f"no Job of it is in {prepared.name}, but pod {pod}" in facts.reason
    with pytest.raises(errors.ConflictError):
        backend.submit(run)
    assert [each["metadata"]["name"] for each in prepared.pods(f"infl/run={GPU_RUN}")] == [pod]
    prepared.api.delete(f"{prepared.core}/pods/{pod}", gracePeriodSeconds="0")
    phase_of(backend, Phase.ABSENT)
    assert backend.submit(run) is True
    prepared.running_pod(GPU_RUN)


def test_what_no_node_can_run_waits_with_the_schedulers_words(bench: Bench, prepared: Namespace) -> None:
    backend = backend_of(bench, prepared, "exit 0")
    backend.submit(run_in(prepared, "hardware.gpu_product=NVIDIA-B200"))

    def words() -> BackendFacts | None:
        facts = backend.get(GPU_RUN)
        return facts if "nodes are available" in facts.reason else None

    facts = until(words, "the scheduler's words")
    assert facts.phase is Phase.QUEUED
    assert facts.reason.startswith("no node takes its pod: 0/")


def test_a_quota_holds_a_run_back_with_its_name(bench: Bench, prepared: Namespace) -> None:
    quota = {"metadata": {"name": "gpus"}, "spec": {"hard": {"requests.nvidia.com/gpu": "4"}}}
    prepared.api.create(f"{prepared.core}/resourcequotas", quota)
    backend = backend_of(bench, prepared, "exit 0")
    backend.submit(run_in(prepared))

    def words() -> BackendFacts | None:
        facts = backend.get(GPU_RUN)
        return facts if "exceeded quota" in facts.reason else None

    facts = until(words, "the quota's name")
    assert facts.phase is Phase.QUEUED
    assert "gpus" in facts.reason and "administrator" in str(facts.next_step)


def test_a_pod_of_higher_priority_takes_the_node_uncharged(bench: Bench, prepared: Namespace) -> None:
    for name, value in (("infl-low", 1), ("infl-high", 1000)):
        with tolerated(409):
            prepared.api.create(PRIORITY_CLASSES, {"metadata": {"name": name}, "value": value})
    bench.add_node("gpu-wanted")
    try:
        there = "cluster.node_selector={kubernetes.io/hostname: gpu-wanted}"
        backend = backend_of(bench, prepared, UNTIL_TERMINATED)
        backend.submit(run_in(prepared, "retry.backoff_limit=0", "cluster.priority_class=infl-low", there))
        first = prepared.running_pod(GPU_RUN)["metadata"]["name"]
        other = run_in(prepared, "cluster.priority_class=infl-high", there)
        backend.submit(RunSpec.new("infl-urgent", other.spec, wandb=other.wandb))
        prepared.running_pod("infl-urgent")
        refused = "no node takes its pod: 0/"  # the scheduler's words come a moment after the pod
        facts = until(lambda: is_refused(backend.get(GPU_RUN), refused), refused)
        assert facts.phase is Phase.QUEUED
        assert facts.num_charged == 0
        preempted = backend.history(GPU_RUN)[0]
        assert preempted.pod == first
        assert str(preempted.ended_by).startswith("preempted: ")
        assert preempted.verdict is Verdict.FREE_RETRY
    finally:
        bench.remove_node("gpu-wanted")


def test_kueue_holds_a_job_back_and_its_switch_is_the_workloads(bench: Bench, prepared: Namespace) -> None:
    """Kueue's definitions are here, its controller is not: the test makes what it would make."""
    bench.apply_crds("kueue")
    backend = backend_of(bench, prepared, "exit 0")
    backend.submit(run_in(prepared, "cluster.scheduler=kueue", "cluster.queue=research"))
    assert backend.get(GPU_RUN).reason == "waits for Kueue's queue 'research'"
    item = prepared.job(GPU_RUN)
    version = served_version(bench, "workloads.kueue.x-k8s.io")
    path = f"/apis/kueue.x-k8s.io/{version}/namespaces/{prepared.name}/workloads"
    pod_set = {"name": "main", "count": 1, "template": {"spec": item["spec"]["template"]["spec"]}}
    prepared.api.create(path, {
        "apiVersion": f"kueue.x-k8s.io/{version}", "kind": "Workload",
        "metadata": {
            "name": f"job-{GPU_RUN}-12345",
            "labels": {"kueue.x-k8s.io/job-uid": item["metadata"]["uid"]},
        },
        "spec": {"queueName": "research", "podSets": [pod_set]},
    })  # fmt: skip
    workload = f"{path}/job-{GPU_RUN}-12345"
    assert backend.suspend(GPU_RUN, timeout_s=10).phase is Phase.SUSPENDED
    assert prepared.api.get(workload)["spec"]["active"] is False
    assert backend.resume(GPU_RUN).phase is Phase.QUEUED
    assert prepared.api.get(workload)["spec"]["active"] is True
    prepared.api.patch(f"{prepared.batch}/jobs/{GPU_RUN}", {"spec": {"suspend": False}})  # admitted
    assert phase_of(backend, Phase.COMPLETED)


def served_version(bench: Bench, name: str) -> str:
    definition = bench.api.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}")
    return next(str(v["name"]) for v in definition["spec"]["versions"] if v["storage"])


def test_a_lost_node_leaves_the_run_stuck_with_what_an_administrator_can_do(
    bench: Bench, prepared: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.backends import pod_facts

    backend = backend_of(bench, prepared, UNTIL_TERMINATED)
    bench.add_node("gpu-lost")
    backend.submit(run_in(prepared, "cluster.node_selector={kubernetes.io/hostname: gpu-lost}"))
    prepared.running_pod(GPU_RUN)
    bench.lose_node("gpu-lost")
    try:

        def deleted() -> bool:
            return any("deletionTimestamp" in pod["metadata"] for pod in prepared.job_pods(GPU_RUN))

        until(deleted, "the pod marked for deletion", timeout_s=90)
        assert backend.get(GPU_RUN).phase is not Phase.STUCK
        monkeypatch.setattr(pod_facts, "LOST_AFTER_S", 0.0)
        facts = phase_of(backend, Phase.STUCK)
        assert "on node gpu-lost should have been gone" in facts.reason
        assert "out-of-service=nodeshutdown:NoExecute" in str(facts.next_step)
        assert backend.list()[GPU_RUN].phase is Phase.STUCK
    finally:
        bench.remove_node("gpu-lost")


def test_logs_are_followed_over_a_killed_api_server_without_loss(bench: Bench, prepared: Namespace) -> None:
    script = "for i in $(seq 1 60); do echo line $i; sleep 0.1; done; printf 'no line end'"
    backend = backend_of(bench, prepared, script)
    backend.submit(run_in(prepared))
    prepared.running_pod(GPU_RUN)
    text, num_reads = b"", 0
    killed = False

    def read() -> bool:
        nonlocal text, num_reads, killed
        facts = backend.get(GPU_RUN)
        number = max(backend.attempts(GPU_RUN), default=None)
        while number and (piece := backend.read_log(GPU_RUN, number, len(text))):
            text += piece
            num_reads += 1
        if not killed and len(text) > 100:
            killed = True
            bench.restart_apiserver()
        return facts.phase is Phase.COMPLETED

    until(read, "the end", timeout_s=60, every_s=0.2)
    assert text == b"".join(f"line {i}\n".encode() for i in range(1, 61)) + b"no line end"
    assert num_reads > 5


def test_a_cancel_waits_over_a_restart_of_the_api_server(bench: Bench, prepared: Namespace) -> None:
    backend = backend_of(bench, prepared, "trap 'sleep 3; exit 75' TERM; while :; do sleep 0.05; done")
    backend.submit(run_in(prepared))
    prepared.running_pod(GPU_RUN)
    with ThreadPoolExecutor(1) as pool:
        cancelled = pool.submit(backend.cancel, GPU_RUN)
        until(lambda: prepared.job(GPU_RUN)["metadata"]["annotations"].get("infl/cancelled-at"), "told")
        bench.restart_apiserver()
        assert cancelled.result(timeout=60).phase is Phase.CANCELLED


def test_a_right_that_is_missing_is_named(bench: Bench, prepared: Namespace) -> None:
    kubeconfig = prepared.service_account_kubeconfig("infl-trainer")
    backend = KubernetesBackend(profile_of(bench, prepared, kubeconfig))
    with pytest.raises(BackendError) as caught:
        backend.get(GPU_RUN)
    assert f"the right 'list' on 'jobs.batch' in namespace '{prepared.name}' is missing" in str(
        caught.value.why
    )
    assert "charts/influence" in str(caught.value.next_step)


def test_a_setting_that_the_server_refuses_names_its_field(bench: Bench, prepared: Namespace) -> None:
    backend = backend_of(bench, prepared, "exit 0")
    with pytest.raises(BackendError) as caught:
        backend.submit(run_in(prepared, "cluster.extended_resources={nodomain: 1}"))
    assert "spec.template.spec.containers[0].resources" in str(caught.value.why)


def test_five_hundred_jobs_take_one_list_of_jobs_and_little_memory(bench: Bench, prepared: Namespace) -> None:
    """All of them wait for a node, so the pods are asked for too, once."""
    api = ScriptedApi(profile_of(bench, prepared), "exit 0")
    backend = KubernetesBackend(profile_of(bench, prepared), api)
    sets = (f"cluster.namespace={prepared.name}", *SMALL, "hardware.gpu_product=NVIDIA-B200")

    def submit(number: int) -> None:
        run = run_of("smoke", (), *sets)
        backend.submit(RunSpec.new(f"infl-many-{number:03d}", run.spec, wandb=run.wandb))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(submit, range(500)))
    until(lambda: len(prepared.pods()) == 500, "a pod each", timeout_s=120, every_s=0.5)
    api.calls.clear()
    started = time.perf_counter()
    facts = backend.list()
    elapsed_s = time.perf_counter() - started
    assert len(facts) == 500
    assert api.calls == ["jobs", "pods"]
    script = (
        "import re, sys, time; from pathlib import Path\n"
        "from launcher.backends import open_backend; from launcher.profiles import Profile\n"
        "t = time.perf_counter()\n"
        "p = Profile(name='b', backend='kubernetes', kubeconfig=Path(sys.argv[1]), namespace=sys.argv[2])\n"
        "b = open_backend(p)\n"
        "assert len(b.list()) == 500\n"
        # not ru_maxrss, which is never less than the memory of the process that started this one
        "peak = re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]\n"
        "print(time.perf_counter() - t, peak)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, bench.kubeconfig, prepared.name],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    whole_s, peak_kib = map(float, done.stdout.split())
    print(f"list of 500: {elapsed_s:.2f} s; with imports {whole_s:.2f} s, peak {peak_kib / 1024:.0f} MiB")
    assert peak_kib < 150 * 1024
