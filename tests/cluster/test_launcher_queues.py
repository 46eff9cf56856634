"""Queues: what the launcher makes is what their CRDs accept, and a run waits until it is let in."""

from __future__ import annotations

from tests.cluster.bench.api import Json
from tests.cluster.bench.bench import Bench
from tests.cluster.fake_trainer_image import fake_trainer_image
from tests.cluster.user import User

RUN = "infl-test"
KUEUE = "/apis/kueue.x-k8s.io/v1beta1"
QUEUE = ("--set", "cluster.queue=team")


def workload(user: User, job: Json) -> Json:
    """What Kueue makes of a Job; there is no Kueue here, so the test plays its part."""
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": RUN, "uid": job["metadata"]["uid"]}
    pod_set = {"name": "main", "count": 1, "template": {"spec": job["spec"]["template"]["spec"]}}
    labels = {"kueue.x-k8s.io/job-uid": job["metadata"]["uid"]}
    return {
        "apiVersion": "kueue.x-k8s.io/v1beta1",
        "kind": "Workload",
        "metadata": {"name": f"job-{RUN}", "labels": labels, "ownerReferences": [owner]},
        "spec": {"queueName": "team", "active": True, "podSets": [pod_set]},
    }


def test_a_run_in_kueues_queue_waits_until_it_is_admitted(bench: Bench, user: User) -> None:
    bench.apply_crds("kueue")
    trainer = fake_trainer_image(bench, user.namespace.name, ["commit 1", "commit 2", "exit 0"])
    user.submit(RUN, trainer, "--set", "cluster.scheduler=kueue", *QUEUE)
    job = user.namespace.job(RUN)
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    workloads = f"{KUEUE}/namespaces/{user.namespace.name}/workloads"
    bench.api.create(workloads, workload(user, job))
    status = user.status(RUN)
    assert status["state"] == "PENDING" and "team" in status["reason"]

    user.launcher("suspend", RUN)  # Kueue owns the Job's own switch
    assert bench.api.get(f"{workloads}/job-{RUN}")["spec"]["active"] is False
    assert user.status(RUN)["state"] == "SUSPENDED"
    user.launcher("resume", RUN)
    assert bench.api.get(f"{workloads}/job-{RUN}")["spec"]["active"] is True

    bench.api.patch(f"{user.namespace.batch}/jobs/{RUN}", {"spec": {"suspend": False}})  # as when admitted
    user.launcher("status", RUN, "--wait")


def test_a_run_for_kai_names_its_scheduler_and_queue_and_waits_for_it(bench: Bench, user: User) -> None:
    trainer = fake_trainer_image(bench, user.namespace.name, ["exit 0"])
    user.submit(RUN, trainer, "--set", "cluster.scheduler=kai", *QUEUE)
    status = user.wait_for_state(RUN, "PENDING")
    assert "scheduler" in status["reason"]  # no KAI is here to place it
    (pod,) = user.namespace.job_pods(RUN)
    assert pod["spec"]["schedulerName"] == "kai-scheduler"
    assert pod["metadata"]["labels"]["kai.scheduler/queue"] == "team"
