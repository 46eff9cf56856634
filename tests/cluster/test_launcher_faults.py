"""The launcher while the cluster fails: the API server dies, a node is lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launcher.backends.kubernetes import KubernetesBackend
from launcher.backends.server_clock import ServerClock
from launcher.profiles import Profile
from launcher.states import Phase
from tests.charts.rights import LAUNCHER_RIGHTS
from tests.cluster.bench.bench import Bench
from tests.cluster.bench.namespace import RBAC
from tests.cluster.bench.waiting import until
from tests.cluster.fake_trainer_image import fake_trainer_image
from tests.cluster.user import User

RUN = "infl-test"
GO_ON = "go on"


def waiting_image(bench: Bench, user: User, *starts: list[str]) -> tuple[str, Path]:
    """An image whose trainer waits, at the order ``wait FILE``, for the file that is returned."""
    signal_file = user.home / "go"
    orders = [[order.replace(GO_ON, f"wait {signal_file}") for order in start] for start in starts]
    return fake_trainer_image(bench, user.namespace.name, *orders), signal_file


def test_watching_and_following_survive_the_api_servers_death(bench: Bench, user: User) -> None:
    trainer, signal_file = waiting_image(
        bench, user, ["say one", "commit 1", GO_ON, "say two", "commit 2", "exit 0"]
    )
    user.submit(RUN, trainer)
    user.wait_for_attempt(RUN, 1, "wait")
    watching, following = user.start("status", RUN, "--watch"), user.start("logs", RUN, "--follow")
    time.sleep(1.5)  # until both have asked once; the test holds either way
    with bench.apiserver_killed():
        status = user.status(RUN)
        assert (status["state"], status["steps_committed"]) == ("UNKNOWN", 1)
        signal_file.touch()  # the trainer ends while nobody can be told
        until(lambda: user.paths(RUN).log(1).read_text().endswith("exit 0\n"), "the trainer's end")
    watched, _ = user.ended(watching)
    assert "SUCCEEDED" in watched
    followed, _ = user.ended(following)
    assert followed == user.paths(RUN).log(1).read_text()  # nothing twice, nothing lost


def test_following_survives_a_server_that_knows_no_roles_yet(bench: Bench, user: User) -> None:
    """As after a restart, before its caches are filled; the launcher has the chart's rights only."""
    trainer, signal_file = waiting_image(bench, user, ["say one", GO_ON, "commit 1", "commit 2", "exit 0"])
    rules = [
        {"apiGroups": [group], "resources": [resource], "verbs": sorted(verbs)}
        for (group, resource), verbs in LAUNCHER_RIGHTS.items()
    ]
    user.namespace.create_service_account("launcher")
    user.namespace.grant("launcher", rules)
    user.describe_cluster(user.namespace.service_account_kubeconfig("launcher"))
    user.submit(RUN, trainer)
    user.wait_for_attempt(RUN, 1, "wait")
    watching, following = user.start("status", RUN, "--watch"), user.start("logs", RUN, "--follow")
    time.sleep(2.5)  # until both have asked once
    role = f"{RBAC}/namespaces/{user.namespace.name}/roles/launcher"
    bench.api.delete(role)
    until(lambda: "does not let you" in user.launcher("status", RUN, code=5), "the refusal")
    time.sleep(2)  # until both have met it
    bench.api.create(role.rpartition("/")[0], {"metadata": {"name": "launcher"}, "rules": rules})
    signal_file.touch()
    watched, told = user.ended(watching)
    assert "SUCCEEDED" in watched and "UNKNOWN" in told
    followed, _ = user.ended(following)
    assert followed == user.paths(RUN).log(1).read_text()


def test_logs_are_read_from_pods_where_the_claim_is_not_mounted_here(bench: Bench, user: User) -> None:
    trainer, signal_file = waiting_image(
        bench, user, ["say one", "exit 3"], ["say two", GO_ON, "say three", "hang"]
    )
    user.describe_cluster(bench.kubeconfig, root=None)
    user.submit(RUN, trainer)
    user.wait_for_attempt(RUN, 2, "wait")
    following = user.start("logs", RUN, "--follow")
    time.sleep(1.5)
    bench.restart_apiserver()
    signal_file.touch()
    user.wait_for_attempt(RUN, 2, "hang")
    user.launcher("cancel", RUN)
    followed, _ = user.ended(following)
    assert [line for line in followed.splitlines() if line.startswith("say")] == ["say two", "say three"]
    assert "say one" in user.launcher("logs", RUN, "--attempt", "1")


def test_a_lost_node_stalls_the_run_until_an_administrator_frees_it(
    bench: Bench, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.add_node("doomed", labels={"pool": "doomed"})
    trainer, _ = waiting_image(bench, user, [GO_ON, "hang"], ["commit 1", "commit 2", "exit 0"])
    user.submit(RUN, trainer, "--set", "cluster.node_selector={pool: doomed}")
    user.wait_for_attempt(RUN, 1, "wait")
    try:
        bench.lose_node("doomed")
        pod = user.namespace.job_pods(RUN)[0]["metadata"]["name"]
        path = f"{user.namespace.core}/pods/{pod}"
        until(lambda: "deletionTimestamp" in bench.api.get(path)["metadata"], "the pod marked")
        assert user.status(RUN)["state"] in ("RETRYING", "TERMINATING")

        profile = Profile(
            name="lab", backend="kubernetes", kubeconfig=bench.kubeconfig, namespace=user.namespace.name
        )
        monkeypatch.setattr(ServerClock, "now_s", lambda _: time.time() + 600)
        facts = KubernetesBackend(profile).get(RUN)
        monkeypatch.undo()
        assert facts.phase is Phase.STUCK
        assert pod in facts.reason and "out-of-service" in (facts.next_step or "")
        # The launcher must not force the pod away: its process may be writing still.
        assert bench.api.find(path) is not None

        bench.add_node("spare", labels={"pool": "doomed"})
        taint = {"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"}
        node = bench.api.get("/api/v1/nodes/doomed")
        bench.api.patch("/api/v1/nodes/doomed", {"spec": {"taints": [*node["spec"]["taints"], taint]}})
        user.launcher("status", RUN, "--wait")
        assert user.namespace.job(RUN)["status"].get("failed", 0) == 0
    finally:
        for name in ("doomed", "spare"):
            bench.remove_node(name)
