"""The phase of a Job from its status and its pods: a table of causes, and properties of any status."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.backends.job_facts import (
    CANCELLED_ANNOTATION,
    SUSPENDED_ANNOTATION,
    JobStatus,
    decisions,
    find,
    leaves_a_question,
)
from launcher.backends.pod_facts import PodFacts, pod_facts
from launcher.backends.pod_obstacles import Finding
from launcher.states import Phase
from tests.launcher.kubernetes_objects import condition, job, lab_run, pod

NOW_S = 1771675200.0  # 2026-02-21T12:00:00Z
KUEUE = lab_run("cluster.scheduler=kueue", "cluster.queue=research")


def marked(item: dict[str, Any], *annotations: str, suspend: bool | None = None) -> dict[str, Any]:
    item["metadata"]["annotations"] |= dict.fromkeys(annotations, "2026-02-21T11:30:00Z")
    if suspend is not None:
        item["spec"]["suspend"] = suspend
    return item


def deleting(item: dict[str, Any], by: str = "2026-02-21T12:02:00Z") -> dict[str, Any]:
    item["metadata"]["deletionTimestamp"] = by
    return item


def waiting(reason: str, message: str) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"containerStatuses": [{"name": "trainer", "state": state}]}


def found(item: dict[str, Any], *pods: dict[str, Any], **words: Any) -> Finding:
    return find(JobStatus.of(item), [pod_facts(each) for each in pods], now_s=NOW_S, **words)


UNSCHEDULABLE = condition(
    "PodScheduled", "Unschedulable", "0/3 nodes: 3 Insufficient nvidia.com/gpu.", "False"
)
DISRUPTED = {"conditions": [condition("DisruptionTarget", "PreemptionByScheduler", "by pod x")]}


@pytest.mark.parametrize(
    ("item", "pods", "phase", "words"),
    [
        # before the first pod
        (job(), [], Phase.QUEUED, "the Job controller has not started a pod yet"),
        (job(active=1, ready=0), [], Phase.QUEUED, "its pod has not reported yet"),
        (job(active=1, ready=0), [pod("a", "Pending", conditions=[UNSCHEDULABLE])],
         Phase.QUEUED, "no node takes its pod: 0/3 nodes: 3 Insufficient nvidia.com/gpu."),
        (job(active=1, ready=0), [pod("a", "Pending", **waiting("ContainerCreating", ""))],
         Phase.QUEUED, "pod a on node gpu-3 is being started: ContainerCreating"),
        # trouble that does not pass
        (job(active=1, ready=0), [pod("a", "Pending", **waiting("ImagePullBackOff", "not found"))],
         Phase.STUCK, "the image registry.lab/infl:2 cannot be pulled: not found"),
        (job(active=1, ready=0), [pod("a", "Pending", **waiting("CreateContainerConfigError", 'secret "x"'))],
         Phase.STUCK, 'its container cannot be configured: secret "x"'),
        # running
        (job(active=1, ready=1), [], Phase.EXECUTING, "its pod runs"),
        (job(active=1, ready=1), [pod("a")], Phase.EXECUTING, "pod a on node gpu-3 runs"),
        (job(active=1, ready=0), [pod("a")], Phase.EXECUTING, "pod a on node gpu-3 runs"),
        # between two pods
        (job(failed=1), [pod("a", "Failed", exit_code=3)],
         Phase.BACKING_OFF, "the last attempt: failed (exit code 3); another follows"),
        (job(failed=2), [], Phase.BACKING_OFF, "2 attempts failed; another follows"),
        (job(terminating=1), [deleting(pod("a", **DISRUPTED))], Phase.BACKING_OFF,
         "pod a on node gpu-3 is stopping (preempted: a pod of higher priority needed the place: by pod x); "
         "another follows"),
        (job(terminating=1), [deleting(pod("a"), "2026-02-21T11:54:00Z")], Phase.STUCK,
         "pod a on node gpu-3 should have been gone 6 min ago, and its node does not say so"),
        # ended
        (job(succeeded=1, conditions=[condition("Complete")]), [], Phase.COMPLETED, "its Job is complete"),
        (job(failed=5, conditions=[condition("Failed", "BackoffLimitExceeded", "Job has reached ...")]),
         [pod("a", "Failed", exit_code=1)],
         Phase.FAILED, "all 4 retries are used up; the last attempt: failed (exit code 1)"),
        (job(lab_run("retry.backoff_limit=0"), conditions=[condition("Failed", "BackoffLimitExceeded")]), [],
         Phase.FAILED, "no retry is allowed"),
        (job(conditions=[condition("Failed", "DeadlineExceeded", "Job was active longer")]), [],
         Phase.FAILED, "the deadline of the whole run, 604800 s, has passed (retry.deadline_s)"),
        (job(failed=1, conditions=[condition(
            "Failed", "PodFailurePolicy", "Container trainer for pod a failed with exit code 78 matching")]),
         [], Phase.FAILED, "configuration error (78), which is not worth a retry"),
        (job(conditions=[condition("Failed", "SomethingNew", "who knows")]), [],
         Phase.FAILED, "its Job failed: SomethingNew: who knows"),
        (job(active=1, conditions=[condition("FailureTarget", "PodFailurePolicy", "exit code 64 ...")]), [],
         Phase.STOPPING, "usage error (64), which is not worth a retry; its last pod is stopping"),
        # cancelled
        (marked(job(active=1, ready=1), CANCELLED_ANNOTATION), [],
         Phase.STOPPING, "cancelled; its pod is stopping"),
        (marked(job(conditions=[condition("Failed", "DeadlineExceeded")]), CANCELLED_ANNOTATION), [],
         Phase.CANCELLED, "cancelled"),
        (marked(job(), CANCELLED_ANNOTATION, suspend=True), [], Phase.CANCELLED, "cancelled"),
        (marked(job(conditions=[condition("Complete")]), CANCELLED_ANNOTATION), [],
         Phase.COMPLETED, "its Job is complete"),
        # suspended
        (marked(job(), SUSPENDED_ANNOTATION, suspend=True), [], Phase.SUSPENDED, "suspended"),
        (marked(job(terminating=1), SUSPENDED_ANNOTATION, suspend=True), [],
         Phase.STOPPING, "suspended; its pod is stopping"),
        (marked(job(), suspend=True), [], Phase.SUSPENDED, "its Job was suspended by somebody else"),
        (job(KUEUE), [], Phase.QUEUED, "waits for Kueue's queue 'research'"),
        (marked(job(KUEUE), SUSPENDED_ANNOTATION), [], Phase.SUSPENDED, "suspended"),
    ],
)  # fmt: skip
def test_each_state_of_a_job_has_a_phase_and_a_reason(
    item: dict[str, Any], pods: list[dict[str, Any]], phase: Phase, words: str
) -> None:
    finding = found(item, *pods)
    assert (finding.phase, finding.reason) == (phase, words)
    assert (finding.next_step is not None) == (phase is Phase.STUCK or "no node takes" in words)


def test_what_others_say_is_passed_on() -> None:
    assert found(job(KUEUE), waits_for="no quota").reason == "waits for Kueue's queue 'research': no quota"
    quota = found(job(), no_pod_because="exceeded quota: gpus")
    assert (quota.phase, quota.reason) == (Phase.QUEUED, "no pod can be created: exceeded quota: gpus")
    assert "larger quota" in str(quota.next_step)


def test_a_lost_node_is_never_answered_with_force() -> None:
    finding = found(job(terminating=1), deleting(pod("a"), "2026-02-21T11:00:00Z"))
    assert "out-of-service=nodeshutdown:NoExecute" in str(finding.next_step)
    assert "delete the Node object" in str(finding.next_step)


@pytest.mark.parametrize(
    ("item", "question"),
    [
        (job(), True),
        (job(active=1, ready=1), False),
        (job(active=1, ready=0), True),
        (job(active=1, ready=1, terminating=1), True),
        (job(failed=1), True),
        (job(conditions=[condition("Complete")]), False),
        (job(conditions=[condition("Failed")]), False),
        (job(KUEUE), False),
    ],
)
def test_pods_are_asked_for_only_where_the_job_leaves_a_question(
    item: dict[str, Any], question: bool
) -> None:
    assert leaves_a_question(JobStatus.of(item)) is question


@pytest.mark.parametrize(
    ("failed", "conditions", "charged"),
    [(0, [], 0), (2, [], 2), (5, [condition("Failed")], 4), (1, [condition("Failed")], 0), (9, [], 4)],
)
def test_the_failure_that_was_the_end_is_no_retry(
    failed: int, conditions: list[dict[str, str]], charged: int
) -> None:
    assert JobStatus.of(job(failed=failed, conditions=conditions)).num_charged == charged


def facts_of(*pods: dict[str, Any]) -> list[PodFacts]:
    return [pod_facts(each) for each in pods]


def test_what_was_decided_after_each_pod() -> None:
    pods = facts_of(
        pod("a", "Failed", exit_code=3), pod("b", "Failed", exit_code=75),
        pod("c", "Failed", exit_code=1), pod("d"),
    )  # fmt: skip
    assert decisions(JobStatus.of(job(active=1)), pods) == [
        "started again, charged: retry 1 of 4",
        "started again, not charged",
        "started again, charged: retry 2 of 4",
        None,
    ]
    last = facts_of(pod("a", "Failed", exit_code=78))
    policy = condition("Failed", "PodFailurePolicy", "failed with exit code 78 matching FailJob")
    for item, words in (
        (job(), "will be started again"),
        (job(conditions=[policy]), "not started again: configuration error (78), which is not worth a retry"),
        (marked(job(), CANCELLED_ANNOTATION), "not started again: cancelled"),
        (marked(job(), SUSPENDED_ANNOTATION, suspend=True), "not started again before the run is resumed"),
    ):
        assert decisions(JobStatus.of(item), last) == [words]
    assert decisions(JobStatus.of(job()), facts_of(pod("a", "Succeeded"))) == ["the run is complete"]


# Whatever controllers write.
STATUS_KEYS = ["active", "ready", "terminating", "failed", "succeeded", "conditions", "startTime"]
CONDITIONS = st.lists(
    st.builds(
        condition,
        st.sampled_from(["Complete", "Failed", "Suspended", "FailureTarget", "SuccessCriteriaMet", "New"]),
        st.sampled_from(["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy", "", "X"]),
        st.sampled_from(["", "exit code 78", "exit code 999", "text"]),
        st.sampled_from(["True", "False", "Unknown"]),
    ),
    max_size=3,
)
STATUSES = st.fixed_dictionaries(
    {},
    optional={
        **{key: st.integers(-1, 3) | st.none() for key in STATUS_KEYS[:5]},
        "conditions": CONDITIONS | st.none(),
    },
)
PODS = st.lists(
    st.builds(
        lambda phase, code, gone: (deleting if gone else dict)(pod("a", phase, exit_code=code)),
        st.sampled_from(["Pending", "Running", "Succeeded", "Failed", "Unknown"]),
        st.none() | st.integers(0, 255),
        st.booleans(),
    ),
    max_size=3,
)
JOB = job()


MARKS = st.sets(st.sampled_from([CANCELLED_ANNOTATION, SUSPENDED_ANNOTATION]))


@given(STATUSES, PODS, st.none() | st.booleans(), MARKS)
def test_no_status_raises_and_only_an_end_is_an_end(
    status: dict[str, Any], pods: list[dict[str, Any]], suspend: bool | None, marks: set[str]
) -> None:
    item = {**JOB, "status": status, "spec": {**JOB["spec"], "suspend": suspend}}
    item["metadata"] = {**JOB["metadata"], "annotations": dict.fromkeys(marks, "x")}
    finding = found(item, *pods)
    assert finding.reason
    said = {c["type"] for c in status.get("conditions") or [] if c["status"] == "True"}
    if finding.phase is Phase.FAILED:
        assert "Failed" in said and CANCELLED_ANNOTATION not in marks
    if finding.phase is Phase.COMPLETED:
        assert "Complete" in said
    if finding.phase in (Phase.COMPLETED, Phase.FAILED, Phase.CANCELLED):
        assert JobStatus.of(item).ended
    decided = decisions(JobStatus.of(item), facts_of(*pods))
    assert len(decided) == len(pods)


JSON_KEYS = ["metadata", "spec", "status", "conditions", "type", "annotations", "labels", *STATUS_KEYS]
JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda below: st.lists(below, max_size=2) | st.dictionaries(st.sampled_from(JSON_KEYS), below),
    max_leaves=12,
)


@given(JSON)
def test_no_json_at_all_raises(item: Any) -> None:
    finding = found(item if isinstance(item, dict) else {"status": item})
    assert finding.phase is not Phase.FAILED or finding.reason
