"""Which deaths of Ray's actors end a run, by tables and with actors that are really killed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.core.generated.common_pb2 import ActorDeathCause, ActorDiedErrorContext

from influence.verl_engine.environment import ray_environment
from influence.verl_engine.watchdog import first_death, lost_node

pytestmark = pytest.mark.slow  # imports Ray

JOB = "01000000"
KILLED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
    "Worker exit detail: Worker unexpectedly exits with a connection error code 2.\nEnd of file."
)
LEFT = (
    "The actor is dead because its worker process has died. Worker exit type: INTENDED_USER_EXIT "
    "Worker exit detail: exit_actor() is called."
)


def died(reason: int, message: str = "") -> ActorDeathCause:
    context = ActorDiedErrorContext(reason=reason, error_message=message)
    return ActorDeathCause(actor_died_error_context=context)


def oom(message: str) -> ActorDeathCause:
    cause = ActorDeathCause()
    cause.oom_context.error_message = message
    return cause


def failed_constructor() -> ActorDeathCause:
    cause = ActorDeathCause()
    cause.creation_task_failure_context.formatted_exception_string = "ValueError"
    return cause


def row(cause: ActorDeathCause | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "JobID": JOB,
        "ActorClassName": "make.<locals>.WorkerDict",
        "Name": "",
        "Pid": 42,
        "State": "ALIVE" if cause is None else "DEAD",
        "EndTime": 0 if cause is None else 7,
        "DeathCause": cause or ActorDeathCause(),
        **changes,
    }


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (
            died(ActorDiedErrorContext.WORKER_DIED, KILLED),
            "Worker unexpectedly exits with a connection error code 2. End of file.",
        ),
        (died(ActorDiedErrorContext.WORKER_DIED), "Ray does not say why"),
        (died(ActorDiedErrorContext.NODE_DIED, "The node has died."), "The node has died."),
        (oom("Task was killed due to the node running low on memory."), "Task was killed due to the node"),
        (died(ActorDiedErrorContext.WORKER_DIED, LEFT), None),
        (died(ActorDiedErrorContext.RAY_KILL, "killed by `ray.kill`"), None),
        (died(ActorDiedErrorContext.OUT_OF_SCOPE, "all references were removed"), None),
        (died(ActorDiedErrorContext.REF_DELETED, "all references were removed"), None),
        (died(ActorDiedErrorContext.OWNER_DIED, "its owner has died"), None),
        (failed_constructor(), None),
        (None, None),
    ],
)
def test_a_death_counts_if_nobody_asked_for_it(cause: ActorDeathCause | None, expected: str | None) -> None:
    death = first_death([row(), row(cause)], JOB)
    if expected is None:
        assert death is None
    else:
        assert death is not None
        assert death.startswith(f"Ray actor WorkerDict (pid 42) died: {expected}")


def test_the_first_death_of_the_job_is_named() -> None:
    cause = died(ActorDiedErrorContext.WORKER_DIED, KILLED)
    rows = [
        row(cause, Pid=1, EndTime=30),
        row(cause, Pid=2, EndTime=20, Name="rank_0"),
        row(cause, Pid=3, EndTime=10, JobID="02000000"),
        row(cause, Pid=4, EndTime=0, State="RESTARTING"),
    ]
    death = first_death(rows, JOB)
    assert death is not None
    assert death.startswith("Ray actor WorkerDict 'rank_0' (pid 2) died: ")
    assert first_death([], JOB) is None


def test_only_a_node_of_the_run_counts_as_lost() -> None:
    def node(node_id: str, **changes: Any) -> dict[str, Any]:
        return {"NodeID": node_id, "NodeManagerAddress": "10.0.0.7", "Alive": True, **changes}

    dead = {"Alive": False, "DeathReasonMessage": "health check failed\ntoo often"}
    assert lost_node([node("a"), node("b"), node("c", **dead)], {"a", "b"}) is None
    assert lost_node([node("a"), node("b", **dead)], {"a", "b"}) == (
        "Ray node 10.0.0.7 died: health check failed too often"
    )
    assert lost_node([node("a", Alive=False, DeathReasonMessage="")], {"a"}) == (
        "Ray node 10.0.0.7 died: Ray does not say why"
    )


DRIVER = """
import os, signal, sys, time
import ray
from influence.verl_engine.watchdog import Watchdog

@ray.remote(num_cpus=0)
class Sleeper:
    def pid(self):
        return os.getpid()
    def sleep(self):
        time.sleep(600)
    def leave(self):
        ray.actor.exit_actor()

def started():
    actor = Sleeper.remote()
    return actor, ray.get(actor.pid.remote())

def end(death):
    print(death, flush=True)
    os._exit(3)

with Watchdog(end, poll_s=0.2):
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    waiting, _ = started()
    for how in (ray.kill, lambda actor: actor.leave.remote(), lambda actor: None):
        actor, _ = started()
        how(actor)
        del actor
    doomed, pid = started()
    time.sleep(2)  # many polls, and only actors that were to end
    if sys.argv[1] == "killed":
        print(pid, flush=True)
        os.kill(pid, signal.SIGKILL)
        ray.get(waiting.sleep.remote())  # as verl waits for what never comes
ray.shutdown()
print("the end", flush=True)
"""


@pytest.mark.parametrize("how", ["killed", "normal"])
def test_a_killed_actor_ends_a_driver_that_waits_and_an_intended_end_does_not(how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, how],
        env={**os.environ, **ray_environment()},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    if how == "normal":
        assert (done.returncode, lines) == (0, ["the end"]), done.stderr
    else:
        assert done.returncode == 3, done.stderr
        pid, death = lines[0], lines[-1]  # the raylet may have a word in between
        assert death.startswith(f"Ray actor Sleeper (pid {pid}) died: ")
