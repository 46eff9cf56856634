"""A run on a cluster through the launcher's own commands: what is retried, charged, refused and told."""

from __future__ import annotations

import os
import signal

import yaml

from tests.cluster.bench.api import Json
from tests.cluster.bench.bench import Bench
from tests.cluster.fake_trainer_image import fake_trainer_image
from tests.cluster.user import User

COMPLETE = ["say hello from the pod", "commit 1", "commit 2", "exit 0"]
RUN = "infl-test"


def image(bench: Bench, user: User, *starts: list[str]) -> str:
    return fake_trainer_image(bench, user.namespace.name, *starts)


def exit_codes(user: User, run: str = RUN) -> list[int]:
    """Of the run's pods, the oldest first, as the server has them."""
    statuses = [pod["status"].get("containerStatuses", []) for pod in user.namespace.pods(f"infl/run={run}")]
    states = [status["state"].get("terminated") for pod in statuses for status in pod]
    return [state["exitCode"] for state in states if state]


def jobs(user: User) -> list[Json]:
    return user.namespace.api.items(f"{user.namespace.batch}/jobs")


def test_a_run_is_submitted_watched_and_collected(bench: Bench, user: User) -> None:
    trainer = image(bench, user, COMPLETE)
    user.submit(RUN, trainer)
    user.launcher("status", RUN, "--wait")
    status = user.status(RUN)
    assert (status["state"], status["steps_committed"], status["backend"]) == (
        "SUCCEEDED",
        2,
        "kubernetes",
    )
    (pod,) = user.namespace.pods(f"infl/run={RUN}")
    assert pod["spec"]["nodeName"].startswith("gpu-")
    assert "say hello from the pod" in user.launcher("logs", RUN)
    user.launcher("collect", "--run", RUN)
    assert (user.home / "results" / RUN / "steps" / "step_000002.npz").exists()
    assert "complete" in user.submit(RUN, trainer)  # and nothing is started again
    assert len(jobs(user)) == 1


def test_the_same_spec_is_adopted_and_another_is_refused_with_the_difference(
    bench: Bench, user: User
) -> None:
    trainer = image(bench, user, ["hang"])
    user.submit(RUN, trainer)
    uid = user.namespace.job(RUN)["metadata"]["uid"]
    user.submit(RUN, trainer)
    refusal = user.submit(RUN, trainer, "--set", "training.learning_rate=0.5", code=4)
    assert "training.learning_rate" in refusal and "0.5" in refusal
    assert [job["metadata"]["uid"] for job in jobs(user)] == [uid]


def test_two_submits_at_once_create_one_job(bench: Bench, user: User) -> None:
    words = user.submit_words(RUN, image(bench, user, COMPLETE))
    both = [user.start(*words, "--output", "json") for _ in range(2)]
    outputs = [user.ended(process)[0] for process in both]
    assert sorted('"started": true' in output for output in outputs) == [False, True]
    assert len(jobs(user)) == 1


def test_a_failure_is_retried_to_the_limit(bench: Bench, user: User) -> None:
    user.submit(RUN, image(bench, user, ["exit 3"]))
    user.launcher("status", RUN, "--wait", code=100)
    assert exit_codes(user) == [3, 3, 3]
    assert "retries" in user.status(RUN)["reason"]
    story = user.launcher("explain", RUN)
    assert "retry 2 of 2" in story and "not started again" in story


def test_a_wrong_configuration_is_not_retried(bench: Bench, user: User) -> None:
    user.submit(RUN, image(bench, user, ["exit 78"]))
    user.launcher("status", RUN, "--wait", code=100)
    assert exit_codes(user) == [78]
    assert "not worth a retry" in user.status(RUN)["reason"]


def test_running_out_of_memory_is_charged_and_named(bench: Bench, user: User) -> None:
    user.submit(RUN, image(bench, user, ["kill"], COMPLETE))
    user.launcher("status", RUN, "--wait")
    assert exit_codes(user) == [137, 0]
    story = user.launcher("explain", RUN)
    assert "memory" in story and "charged: retry 1 of 2" in story


def test_sigterm_and_eviction_are_not_charged(bench: Bench, user: User) -> None:
    user.submit(RUN, image(bench, user, ["hang"], ["hang"], COMPLETE), "--set", "retry.backoff_limit=0")
    first = user.namespace.running_pod(RUN)
    user.wait_for_attempt(RUN, 1, "hang")
    os.kill(user.namespace.process_id(first, "trainer"), signal.SIGTERM)
    user.wait_for_attempt(RUN, 2, "hang")
    user.namespace.evict(user.namespace.running_pod(RUN)["metadata"]["name"])
    user.launcher("status", RUN, "--wait")
    assert user.namespace.job(RUN)["status"].get("failed", 0) == 0
    assert "not charged" in user.launcher("explain", RUN)


def test_a_suspended_run_gives_its_node_back_and_goes_on_later(bench: Bench, user: User) -> None:
    user.submit(RUN, image(bench, user, ["commit 1", "hang"], ["commit 2", "exit 0"]))
    user.wait_for_attempt(RUN, 1, "hang")
    user.launcher("suspend", RUN)
    assert user.status(RUN)["state"] == "SUSPENDED"
    assert not [pod for pod in user.namespace.job_pods(RUN) if pod["status"]["phase"] == "Running"]
    assert "the run was suspended" in user.launcher("explain", RUN)
    user.launcher("resume", RUN)
    user.launcher("status", RUN, "--wait")
    assert user.status(RUN)["steps_committed"] == 2


def test_a_cancelled_run_keeps_its_job_and_starts_again_as_another(bench: Bench, user: User) -> None:
    trainer = image(bench, user, ["commit 1", "hang"], ["commit 2", "exit 0"])
    user.submit(RUN, trainer)
    user.wait_for_attempt(RUN, 1, "hang")
    user.launcher("cancel", RUN)
    user.launcher("status", RUN, "--wait", code=103)
    user.launcher("cancel", RUN)  # harmless
    story = user.launcher("explain", RUN)
    assert "the run was cancelled" in story and "not started again: cancelled" in story
    assert "warning" not in story.lower(), "its deadline is how it was cancelled"
    assert "by `launcher cancel`" in user.launcher("events", RUN)
    user.submit(RUN, trainer)
    user.launcher("status", RUN, "--wait")
    assert sorted(job["metadata"]["name"] for job in jobs(user)) == [RUN, f"{RUN}-r2"]
    assert user.status(RUN)["steps_committed"] == 2


def test_an_image_that_cannot_be_pulled_is_stalled_and_named(user: User) -> None:
    user.submit(RUN, "registry.example/missing/image:1")
    status = user.wait_for_state(RUN, "STALLED")
    assert "registry.example/missing/image:1" in status["reason"]
    assert status["next_step"]


def test_a_run_that_fits_no_node_is_pending_in_the_schedulers_words(bench: Bench, user: User) -> None:
    user.submit(RUN, image(bench, user, COMPLETE), "--set", "hardware.gpu_product=NVIDIA-B300")
    status = user.wait_for_reason(RUN, "didn't match Pod's node affinity/selector")
    assert status["state"] == "PENDING"


def test_a_quota_is_named_until_it_lets_the_run_start(bench: Bench, user: User) -> None:
    namespace = user.namespace
    path = namespace.create_quota("gpus", {"requests.nvidia.com/gpu": "4"})
    user.submit(RUN, image(bench, user, COMPLETE))
    assert user.wait_for_reason(RUN, "exceeded quota: gpus")["state"] == "PENDING"
    namespace.api.delete(path)
    user.launcher("status", RUN, "--wait")


def test_a_claim_or_an_account_that_is_not_there_is_stalled_until_it_is(bench: Bench, user: User) -> None:
    trainer = image(bench, user, COMPLETE)
    user.submit("infl-claim", trainer, "--set", "cluster.claim=nope")
    user.submit("infl-account", trainer, "--set", "cluster.service_account=nobody")
    claim = user.wait_for_state("infl-claim", "STALLED")
    assert 'persistentvolumeclaim "nope" not found' in claim["reason"]
    assert "cluster.claim" in str(claim)
    account = user.wait_for_state("infl-account", "STALLED")
    assert 'serviceaccount "nobody" not found' in account["reason"]
    assert "cluster.service_account" in str(account) and "quota" not in str(account)
    listed = {run["run"]: run["reason"] for run in user.document("status")}
    assert listed["infl-account"] == account["reason"]
    user.namespace.create_service_account("nobody")
    user.launcher("status", "infl-account", "--wait")


def test_a_higher_priority_preempts_uncharged(bench: Bench, user: User) -> None:
    bench.add_node("contested", labels={"pool": "contested"})
    bench.create_priority("infl-low", 1)
    bench.create_priority("infl-high", 1000)
    pool = ("--set", "cluster.node_selector={pool: contested}")
    trainer = image(bench, user, ["hang"], COMPLETE)
    try:
        user.submit("infl-low", trainer, *pool, "--set", "cluster.priority_class=infl-low")
        user.wait_for_attempt("infl-low", 1, "hang")
        user.submit("infl-high", trainer, *pool, "--set", "cluster.priority_class=infl-high")
        user.launcher("status", "infl-high", "--wait")
        user.launcher("status", "infl-low", "--wait")
    finally:
        bench.remove_node("contested")
    assert user.namespace.job("infl-low")["status"].get("failed", 0) == 0
    assert "Preempted by pod" in user.launcher("events", "infl-low")


def test_a_right_that_is_missing_is_named(bench: Bench, user: User) -> None:
    user.namespace.create_service_account("guest")
    reads = [
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]},
    ]
    user.namespace.grant("guest", reads)
    guest = user.namespace.service_account_kubeconfig("guest")
    user.describe_cluster(guest)
    words = user.launcher("--debug", *user.submit_words(RUN, image(bench, user, COMPLETE)), code=5)
    assert "create" in words and "jobs" in words
    token = yaml.safe_load(guest.read_text())["users"][0]["user"]["token"]
    assert token not in words and token[-40:] not in words
    assert jobs(user) == []
