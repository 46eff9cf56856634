"""The main job on a cluster: the real trainer in a pod, killed once, and collected from the claim."""

from __future__ import annotations

import os
import signal

from influence.rundir import list_attempts, load_step
from tests.cluster.user import User

RUN = "infl-main"


def test_the_real_trainer_runs_in_a_pod_is_retried_and_collected(user: User) -> None:
    options = ("--preset", "alltoken-timing", "--overlay", "tiny-cpu", "--name", RUN)
    settings = {"training.total_steps": 1, "hardware.ranks_per_node": 1, "cluster.image": "bench/real:1"}
    user.launcher(
        "submit", *options, *(word for item in settings.items() for word in ("--set", "{}={}".format(*item)))
    )
    user.wait_for_attempt(RUN, 1, "attempt 1")
    os.kill(user.namespace.process_id(user.namespace.running_pod(RUN), "trainer"), signal.SIGKILL)
    user.launcher("status", RUN, "--wait")

    status = user.status(RUN)
    assert (status["state"], status["steps_committed"], status["charged_retries"]) == ("SUCCEEDED", 1, 1)
    user.launcher("collect", "--run", RUN)
    step = load_step(user.home / "results" / RUN, 1)
    assert step.record.attempt == 2
    assert sum(row.scores.size for row in step.rows()) == step.arrays.scores.size > 0
    pods = [pod["metadata"]["name"] for pod in user.namespace.job_pods(RUN)]
    attempts = [str(attempt.pod) for attempt in list_attempts(user.paths(RUN))]
    assert sorted(attempts) == sorted(pods)  # both may have been created within the same second
    assert "memory" in user.launcher("explain", RUN)
