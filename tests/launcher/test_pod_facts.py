"""What a pod's status says: each cause of an end and of a wait, and that nothing in it can raise."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from influence.rundir.exits import Verdict, classify
from launcher.backends.pod_facts import LOST_AFTER_S, age_s, pod_facts

NOON_S = 1771675200.0  # 2026-02-21T12:00:00Z


def pod(phase: str = "Running", **status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "infl-a-x7k2p", "uid": "u1", "creationTimestamp": "2026-02-21T11:00:00Z"},
        "spec": {"nodeName": "gpu-3", "containers": [{"name": "trainer", "image": "registry.lab/infl:2"}]},
        "status": {"phase": phase, **status},
    }


def terminated(code: int, reason: str = "Error") -> dict[str, Any]:
    state = {
        "exitCode": code, "reason": reason,
        "startedAt": "2026-02-21T11:00:05Z", "finishedAt": "2026-02-21T11:30:00Z",
    }  # fmt: skip
    return {
        "containerStatuses": [
            {"name": "sidecar", "state": {}},
            {"name": "trainer", "state": {"terminated": state}},
        ]
    }


def disrupted(reason: str, message: str = "") -> dict[str, Any]:
    return {
        "conditions": [{"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message}]
    }


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    return {
        "containerStatuses": [
            {"name": "trainer", "state": {"waiting": {"reason": reason, "message": message}}}
        ]
    }


@pytest.mark.parametrize("code", range(1, 256))
def test_an_exit_code_counts_as_the_exit_table_says(code: int) -> None:
    facts = pod_facts(pod("Failed", **terminated(code)))
    assert facts.verdict is classify(code)
    assert facts.exit_code == code


@pytest.mark.parametrize(
    ("status", "verdict", "words"),
    [
        (terminated(3), Verdict.CHARGED_RETRY, "failed (exit code 3)"),
        (terminated(78), Verdict.FATAL, "configuration error (78)"),
        (terminated(75), Verdict.FREE_RETRY, "asked to be started again (75)"),
        (terminated(137, "OOMKilled"), Verdict.CHARGED_RETRY, "out of memory: the container reached"),
        (terminated(137), Verdict.CHARGED_RETRY, "killed by SIGKILL (137), out of memory or killed"),
        ({**terminated(1), **disrupted("EvictionByEvictionAPI", "evicting")}, Verdict.FREE_RETRY,
         "evicted: its node was drained, or somebody evicted the pod: evicting; the trainer failed"),
        (disrupted("PreemptionByScheduler"), Verdict.FREE_RETRY, "preempted: a pod of higher priority"),
        (disrupted("DeletionByTaintManager"), Verdict.FREE_RETRY, "evicted: its node got a taint"),
        (disrupted("DeletionByPodGC"), Verdict.FREE_RETRY, "its node is gone"),
        (disrupted("NewlyInvented", "why not"), Verdict.FREE_RETRY, "disrupted (NewlyInvented): why not"),
        ({**disrupted("TerminationByKubelet"), "reason": "Evicted", "message": "The node was low on memory"},
         Verdict.FREE_RETRY, "its node took it down: The node was low on memory"),
        ({"reason": "Evicted", "message": "The node was low on disk"}, Verdict.CHARGED_RETRY,
         "evicted by its node: The node was low on disk"),
        ({"reason": "UnexpectedAdmissionError", "message": "no devices"}, Verdict.CHARGED_RETRY,
         "UnexpectedAdmissionError: no devices"),
        ({}, Verdict.CHARGED_RETRY, "failed without a word"),
    ],
)  # fmt: skip
def test_what_ended_a_pod_and_how_it_counts(status: dict[str, Any], verdict: Verdict, words: str) -> None:
    facts = pod_facts(pod("Failed", **status))
    assert facts.verdict is verdict
    assert str(facts.ended_by).startswith(words)


def test_a_pod_that_goes_on_has_no_end() -> None:
    facts = pod_facts(pod())
    assert (facts.ended, facts.verdict, facts.ended_by) == (False, None, None)
    attempt = facts.attempt(number=2, decision=None)
    assert (attempt.where, attempt.pod) == ("pod infl-a-x7k2p on node gpu-3", "infl-a-x7k2p")
    assert (attempt.ended_at, attempt.started_at) == (None, "2026-02-21T11:00:00Z")


def test_a_pod_that_waits_has_not_begun() -> None:
    for item, begun in (
        (pod("Pending"), False),
        (pod("Pending", **waiting("ErrImagePull")), False),
        (pod("Running"), True),
        (pod("Failed", **terminated(3)), True),
        (pod("Failed", **disrupted("Preempted")), True),
    ):
        assert pod_facts(item).attempt(number=None, decision=None).begun is begun


def test_an_attempt_has_the_containers_times() -> None:
    attempt = pod_facts(pod("Failed", **terminated(3))).attempt(number=1, decision="started again")
    assert (attempt.started_at, attempt.ended_at) == ("2026-02-21T11:00:05Z", "2026-02-21T11:30:00Z")
    assert (attempt.exit_code, attempt.decision) == (3, "started again")


@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff", "InvalidImageName"])
def test_an_image_that_cannot_be_pulled_is_named_with_the_registrys_words(reason: str) -> None:
    trouble = pod_facts(pod("Pending", **waiting(reason, "manifest unknown"))).trouble
    assert trouble is not None
    assert trouble.reason == "the image registry.lab/infl:2 cannot be pulled: manifest unknown"
    assert "cluster.image_pull_secrets" in trouble.next_step


def test_a_missing_secret_and_what_passes_by_itself() -> None:
    trouble = pod_facts(
        pod("Pending", **waiting("CreateContainerConfigError", 'secret "x" not found'))
    ).trouble
    assert trouble is not None and 'secret "x" not found' in trouble.reason
    facts = pod_facts(pod("Pending", **waiting("ContainerCreating")))
    assert (facts.trouble, facts.waiting) == (None, "ContainerCreating")


def test_an_init_containers_trouble_is_seen_first() -> None:
    status = {
        "initContainerStatuses": [{"name": "i", "state": {"waiting": {"reason": "ErrImagePull"}}}],
        **waiting("PodInitializing"),
    }
    assert pod_facts(pod("Pending", **status)).trouble is not None


def test_the_schedulers_words() -> None:
    words = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": words}
    assert pod_facts(pod("Pending", conditions=[condition])).unschedulable == words
    condition["reason"] = "SchedulingGated"
    assert pod_facts(pod("Pending", conditions=[condition])).unschedulable is None


def test_a_pod_whose_deletion_never_ends_is_on_a_lost_node() -> None:
    lost = pod()
    lost["metadata"]["deletionTimestamp"] = "2026-02-21T12:00:00Z"  # the grace period is in it
    facts = pod_facts(lost)
    assert not facts.deletion_overdue(NOON_S + LOST_AFTER_S - 1)
    assert facts.deletion_overdue(NOON_S + LOST_AFTER_S + 1)
    assert not pod_facts(pod()).deletion_overdue(NOON_S * 2)
    lost["status"]["phase"] = "Failed"
    assert not pod_facts(lost).deletion_overdue(NOON_S * 2)


def test_the_age_of_what_cannot_be_read_is_unknown() -> None:
    assert age_s("2026-02-21T12:00:00Z", NOON_S + 5) == 5
    assert age_s(None, 0) is age_s("soon", 0) is age_s("2026-02-21T12:00:00", 0) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(
        st.sampled_from([
            "phase", "state", "terminated", "waiting", "reason", "message", "exitCode", "name", "type",
            "status", "containerStatuses", "conditions", "initContainerStatuses", "startedAt", "finishedAt",
        ]), below, max_size=5,
    ),
    max_leaves=15,
)  # fmt: skip


@given(st.fixed_dictionaries({"metadata": JSON, "spec": JSON, "status": JSON}) | st.just({}))
def test_no_status_raises(item: dict[str, Any]) -> None:
    facts = pod_facts(item)
    assert (facts.ended_by is None) is (facts.verdict is None) is not facts.ended
    facts.attempt(number=None, decision=None)
    facts.deletion_overdue(NOON_S)
