"""What doctor says about a Run:ai profile, against the stub."""

from __future__ import annotations

from typing import Any

import pytest

from influence.rundir import RunSpec
from launcher.backends.runai_checks import checks
from launcher.doctor import Check
from launcher.profiles import Profile
from tests.launcher.runai_stub import Fault, RunaiStub
from tests.launcher.test_render_job import run_of
from tests.launcher.test_runai_client import ENVIRONMENT, access_to, assert_no_secrets, no_proxies, stub

__all__ = ["no_proxies", "stub"]

GPU_RUN = run_of("smoke", (), "cluster.node_pools=[h200]")


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def told(stub: RunaiStub, run: RunSpec | None = GPU_RUN, **access: Any) -> dict[str, Check]:
    profile = Profile(name="lab", backend="runai", runai=access_to(stub.url, **access))
    found = {check.name: check for check in checks(profile, run)}
    assert_no_secrets(stub, repr(found))
    assert all(check.next_step for check in found.values() if check.outcome in ("failed", "warning"))
    return found


def test_everything_is_there(stub: RunaiStub) -> None:
    found = told(stub)
    assert {name: check.outcome for name, check in found.items()} == {
        "run": "ok", "credentials": "ok", "project": "ok", "workloads": "ok",
        "right to create trainings": "ok", "node pools": "ok", "quota": "ok", "logs": "warning",
    }  # fmt: skip
    assert not stub.workloads, "a look creates nothing"
    assert told(stub, None).keys() == {
        "credentials", "project", "workloads", "right to create trainings", "logs"
    }  # fmt: skip


def test_credentials_that_are_missing_or_wrong_end_it(
    stub: RunaiStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNAI_CLIENT_SECRET", "another-secret")
    found = told(stub, None)
    assert list(found) == ["credentials"]
    assert "does not accept" in found["credentials"].detail
    monkeypatch.delenv("RUNAI_CLIENT_SECRET")
    assert "RUNAI_CLIENT_SECRET is not set" in told(stub, None)["credentials"].detail


def test_a_project_or_cluster_that_is_not_there(stub: RunaiStub) -> None:
    found = told(stub, None, cluster="hall-9")
    assert found["project"].outcome == "failed"
    assert "hall-1" in found["project"].detail
    stub.projects.clear()
    assert "no project 'lab'" in told(stub, None)["project"].detail


def test_missing_rights_are_told_one_by_one(stub: RunaiStub) -> None:
    stub.refused_methods = {("POST", "/trainings")}
    found = told(stub)
    assert found["right to create trainings"].outcome == "failed"
    assert "create and delete trainings" in str(found["right to create trainings"].next_step)
    assert found["workloads"].outcome == "ok"
    stub.refused_methods = {("GET", "/workloads"), ("GET", "/node-pools")}
    found = told(stub)
    assert (found["workloads"].outcome, found["node pools"].outcome) == ("failed", "unknown")


@pytest.mark.parametrize("kind", ["502", "html", "empty"])
def test_an_answer_that_says_nothing_about_the_right(stub: RunaiStub, kind: str) -> None:
    stub.faults.append(Fault(kind, method="POST", part="/trainings"))
    assert told(stub, None)["right to create trainings"].outcome == "unknown"


def test_node_pools_that_are_not_there(stub: RunaiStub) -> None:
    found = told(stub, run_of("smoke", (), "cluster.node_pools=[h200, b300]"))["node pools"]
    assert found.outcome == "failed"
    assert "b300" in found.detail
    assert "default, h200" in str(found.next_step)


@pytest.mark.parametrize(
    ("quota", "preemptible", "outcome"),
    [(-1, True, "ok"), (8, False, "ok"), (4, True, "warning"), (4, False, "failed"), (None, True, None),
     ("many", True, None)],
)  # fmt: skip
def test_the_quota_is_compared_where_it_is_told(
    stub: RunaiStub, quota: Any, preemptible: bool, outcome: str | None
) -> None:
    stub.projects[1]["totalResources"] = {"gpuQuota": quota}
    found = told(stub, run_of("smoke", (), f"cluster.preemptible={str(preemptible).lower()}"))
    assert (found["quota"].outcome if "quota" in found else None) == outcome


def test_a_run_that_is_no_training(stub: RunaiStub) -> None:
    assert told(stub, run_of("smoke", (), "cluster.priority_class=urgent"))["run"].outcome == "failed"


def test_a_profile_without_run_ai() -> None:
    (check,) = checks(Profile(name="lab", backend="runai"), None)
    assert check.outcome == "failed"
