"""What schedulers and controllers say of pods that do not come to be, as API servers were seen to say it."""

from __future__ import annotations

import pytest

from launcher.backends.pod_obstacles import not_created, not_scheduled
from launcher.states import Phase

NOBODY = (
    'Error creating: pods "a-" is forbidden: error looking up service account lab/nobody: '
    'serviceaccount "nobody" not found'
)


@pytest.mark.parametrize(
    ("words", "phase", "advice"),
    [
        ("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", Phase.QUEUED, "cluster.node_selector"),
        ('0/2 nodes are available: persistentvolumeclaim "nope" not found. not found', Phase.STUCK,
         "create the claim 'nope'"),
        ('0/2 nodes are available: persistentvolumeclaim "old" is being deleted.', Phase.STUCK,
         "correct cluster.claim or cluster.data_claim"),
        ("0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims.", Phase.QUEUED,
         "kubectl describe persistentvolumeclaim"),
    ],
)  # fmt: skip
def test_what_keeps_a_pod_from_a_node(words: str, phase: Phase, advice: str) -> None:
    finding = not_scheduled(words, note="; meanwhile")
    assert (finding.phase, finding.reason) == (phase, f"no node takes its pod: {words}; meanwhile")
    assert advice in str(finding.next_step)


@pytest.mark.parametrize(
    ("words", "phase", "advice"),
    [
        ('pods "a" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=8', Phase.QUEUED,
         "larger quota"),
        (NOBODY, Phase.STUCK, "create the service account 'nobody'"),
        (NOBODY, Phase.STUCK, "correct cluster.service_account"),
        ('pods "a" is forbidden: no PriorityClass with name high was found', Phase.STUCK,
         "create the priority class 'high'"),
        ('pods "a" is forbidden: violates PodSecurity "restricted:latest": ...', Phase.STUCK,
         "Pod Security Standard"),
        ('admission webhook "policy.example" denied the request: no', Phase.QUEUED, "tries again by itself"),
    ],
)  # fmt: skip
def test_what_keeps_a_pod_from_being_created(words: str, phase: Phase, advice: str) -> None:
    finding = not_created(words)
    assert (finding.phase, finding.reason) == (phase, f"no pod can be created: {words}")
    assert advice in str(finding.next_step)
    assert ("quota" in str(finding.next_step)) == ("quota" in words)
