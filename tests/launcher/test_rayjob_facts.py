"""What a RayJob's status means, for every status that KubeRay writes, and for torn ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from influence.rundir.clock import parse_time
from launcher.backends.pod_facts import pod_facts
from launcher.backends.rayjob_facts import RayJobStatus, decision, find, leaves_a_question
from launcher.states import Phase
from tests.launcher.kuberay_objects import AT, RUN, failed_with, ray_pod, rayjob, two_node_run

CLUSTER = f"{RUN}-x7k2p"
NOW_S = parse_time(AT).timestamp() + 60
ANNOTATIONS = {"cancelled": "infl/cancelled-at", "suspended": "infl/suspended-at"}


def status_of(*marks: str, suspend: bool = False, sets: tuple[str, ...] = (), **status: Any) -> RayJobStatus:
    item = rayjob(two_node_run(*sets), **status)
    item["metadata"]["annotations"] |= {ANNOTATIONS[mark]: AT for mark in marks}
    if suspend:
        item["spec"]["suspend"] = True
    return RayJobStatus.of(item)


def phase_of(status: RayJobStatus, *pods: dict[str, Any], now_s: float = NOW_S) -> tuple[Phase, str]:
    finding = find(status, [pod_facts(pod) for pod in pods], now_s=now_s)
    return finding.phase, finding.reason


@pytest.mark.parametrize(
    ("status", "phase", "words"),
    [
        (status_of(), Phase.QUEUED, "has not started a Ray cluster yet"),
        (status_of(deployment="Initializing"), Phase.QUEUED, "is being started"),
        (status_of(deployment="Initializing", failed=2), Phase.BACKING_OFF, "after 2 attempts that failed"),
        (status_of(deployment="Running", rayClusterName=CLUSTER), Phase.EXECUTING, CLUSTER),
        (status_of(deployment="Running", job="RUNNING"), Phase.EXECUTING, "runs"),
        (status_of(deployment="Running", job="SUCCEEDED"), Phase.EXECUTING, "the trainer has ended"),
        (
            status_of(deployment="Retrying", job="FAILED", failed=1, message=failed_with(137)),
            Phase.BACKING_OFF,
            "the last attempt: killed by SIGKILL (137)",
        ),
        (status_of(suspend=True, deployment="Running"), Phase.STOPPING, "suspended"),
        (status_of("suspended", suspend=True, deployment="Suspending"), Phase.STOPPING, "suspended"),
        (status_of("suspended", suspend=True, deployment="Suspended"), Phase.SUSPENDED, "suspended"),
        (status_of(suspend=True, deployment="Suspended"), Phase.SUSPENDED, "by somebody else"),
        (status_of("cancelled", deployment="Running"), Phase.STOPPING, "cancelled"),
        (status_of("cancelled", suspend=True, deployment="Suspended"), Phase.CANCELLED, "cancelled"),
        (
            status_of("cancelled", deployment="Failed", reason="DeadlineExceeded", endTime=AT),
            Phase.CANCELLED,
            "cancelled",
        ),
        (status_of("cancelled", deployment="Complete", job="SUCCEEDED"), Phase.COMPLETED, "complete"),
        (status_of(deployment="Complete", job="SUCCEEDED"), Phase.COMPLETED, "complete"),
        (status_of(deployment="Complete", job="STOPPED"), Phase.FAILED, "stopped by somebody"),
        (
            status_of(deployment="Failed", reason="DeadlineExceeded", failed=1),
            Phase.FAILED,
            "the deadline of an attempt, 604800 s, has passed",
        ),
        (
            status_of(deployment="Failed", reason="PreRunningDeadlineExceeded", failed=5),
            Phase.FAILED,
            "not all of its pods ran within 86400 s",
        ),
        (
            status_of(
                deployment="Failed", job="FAILED", reason="AppFailed", failed=5, message=failed_with(3)
            ),
            Phase.FAILED,
            "all 4 retries are used up; the last attempt: failed (exit code 3)",
        ),
        (
            status_of(
                deployment="Failed", job="FAILED", reason="AppFailed", failed=5,
                message=failed_with(78, "influence.train: attempt 5", "influence.train: no GPU here"),
            ),
            Phase.FAILED,
            "configuration error (78): no GPU here; KubeRay retries what no retry cures",
        ),
        (
            status_of(deployment="ValidationFailed", reason="ValidationFailed", message="bad\nname"),
            Phase.FAILED,
            "KubeRay refuses the RayJob: bad name",
        ),
    ],
)  # fmt: skip
def test_every_status_has_its_phase(status: RayJobStatus, phase: Phase, words: str) -> None:
    found, reason = phase_of(status)
    assert (found, words in reason) == (phase, True), reason


def test_kueue_holds_a_rayjob_back() -> None:
    status = status_of(suspend=True, sets=("cluster.scheduler=kueue", "cluster.queue=research"))
    finding = find(status, [], now_s=NOW_S, waits_for="no quota")
    assert (finding.phase, finding.reason) == (Phase.QUEUED, "waits for Kueue's queue 'research': no quota")


def test_a_rayjob_that_nobody_looks_at_is_stuck() -> None:
    finding = find(status_of(), [], now_s=NOW_S + 300)
    assert finding.phase is Phase.STUCK
    assert finding.next_step is not None and "operator runs" in finding.next_step
    assert phase_of(status_of(deployment="Initializing"), now_s=NOW_S + 300)[0] is Phase.QUEUED
    # Between two attempts the status is empty again, but for its counters.
    assert phase_of(status_of(deployment="Initializing", failed=1), now_s=NOW_S + 300)[0] is Phase.BACKING_OFF


def test_pods_say_why_a_cluster_does_not_start() -> None:
    status = status_of(deployment="Initializing", rayClusterName=CLUSTER)
    head = ray_pod(CLUSTER)
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}
    bad_image = ray_pod(
        CLUSTER, worker=True, phase="Pending", containerStatuses=[{"name": "trainer", "state": waiting}]
    )
    phase, reason = phase_of(status, head, bad_image)
    assert (phase, "registry.lab/infl:2 cannot be pulled: no such tag" in reason) == (Phase.STUCK, True)
    unschedulable = {
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/9 nodes",
    }  # fmt: skip
    no_node = ray_pod(CLUSTER, worker=True, phase="Pending", node=None, conditions=[unschedulable])
    phase, reason = phase_of(status, head, no_node)
    assert phase is Phase.QUEUED
    assert "0/9 nodes; 1 of its pods hold their nodes meanwhile" in reason
    no_claim = {**unschedulable, "message": '0/9 nodes: persistentvolumeclaim "nope" not found.'}
    phase, reason = phase_of(
        status, head, ray_pod(CLUSTER, phase="Pending", node=None, conditions=[no_claim])
    )
    assert (phase, '"nope" not found' in reason) == (Phase.STUCK, True)
    phase, reason = phase_of(status, head, ray_pod(CLUSTER, worker=True, phase="Pending"))
    assert (phase, "1 of its 2 pods run" in reason) == (Phase.QUEUED, True)


def test_a_lost_node_is_stuck_whatever_the_rayjob_says() -> None:
    for status in (status_of(deployment="Running"), status_of("cancelled", deployment="Failed", endTime=AT)):
        lost = ray_pod(CLUSTER, worker=True, deleted=AT)
        assert phase_of(status, lost, now_s=NOW_S)[0] is not Phase.STUCK
        assert phase_of(status, lost, now_s=NOW_S + 600)[0] is Phase.STUCK


def test_a_cancelled_run_stops_until_its_pods_are_gone() -> None:
    status = status_of("cancelled", deployment="Failed", reason="DeadlineExceeded", endTime=AT)
    assert leaves_a_question(status, NOW_S)
    assert phase_of(status, ray_pod(CLUSTER))[0] is Phase.STOPPING
    assert phase_of(status)[0] is Phase.CANCELLED
    assert status.ended_by == "stopped: the run was cancelled"
    assert not leaves_a_question(status, NOW_S + 3600), "a list of old runs asks for no pods"


def test_charges_and_decisions() -> None:
    retrying = status_of(deployment="Retrying", job="FAILED", failed=2, message=failed_with(1))
    assert (retrying.num_charged, decision(retrying)) == (2, "started again, charged: retry 2 of 4")
    used_up = status_of(deployment="Failed", job="FAILED", failed=5, message=failed_with(1))
    assert used_up.num_charged == 4
    assert decision(used_up) == (
        "not started again: all 4 retries are used up; the last attempt: failed (exit code 1)"
    )
    assert decision(status_of(deployment="Running")) is None


def test_no_secret_of_the_log_gets_into_a_reason() -> None:
    secret = "0123456789abcdef" * 3
    message = failed_with(1, f"influence.train: WANDB_API_KEY={secret}")
    status = status_of(deployment="Failed", job="FAILED", failed=5, message=message)
    assert secret not in phase_of(status)[1]


_WORDS = st.sampled_from(
    ["", "Initializing", "Running", "Complete", "Failed", "ValidationFailed", "Suspending", "Suspended",
     "Retrying", "Waiting", "SomethingNew"]
)  # fmt: skip
_JOBS = st.sampled_from(["", "PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED", "NEW"])


@given(_WORDS, _JOBS, st.booleans(), st.booleans(), st.one_of(st.none(), st.integers(), st.text()))
def test_no_status_is_beyond_words(
    deployment: str, job: str, suspend: bool, cancelled: bool, anything: Any
) -> None:
    marks = ("cancelled",) if cancelled else ()
    status = status_of(
        *marks,
        suspend=suspend,
        deployment=deployment,
        job=job,
        message=anything,
        failed=anything,
        endTime=anything,
    )
    phase, reason = phase_of(status, ray_pod(CLUSTER))
    assert reason
    if phase in (Phase.COMPLETED, Phase.FAILED, Phase.CANCELLED):
        assert status.ended, "only what KubeRay has ended has ended"
    assert phase is not Phase.COMPLETED or job == "SUCCEEDED"
