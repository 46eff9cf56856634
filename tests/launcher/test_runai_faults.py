"""Whatever a control plane does to the answers: one training a run, no traceback, no secret in any output."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from influence.rundir import RunDirError
from launcher.backends import Backend
from launcher.errors import LauncherError
from launcher.states import Phase
from tests.launcher.runai_stub import PROJECT, Fault, RunaiStub
from tests.launcher.test_runai_backend import NAME, OTHER, RUN, backend_for
from tests.launcher.test_runai_client import assert_no_secrets, everything_told, no_proxies, stub

__all__ = ["no_proxies", "stub"]

KINDS = ["401", "403", "404", "409", "429", "500", "502", "503", "504", "reset", "html", "not-json", "shape",
         "empty", "302"]  # fmt: skip
FAULTS = st.builds(
    Fault,
    st.sampled_from(KINDS),
    after=st.booleans(),
    method=st.sampled_from([None, "GET", "POST", "DELETE"]),
    part=st.sampled_from(["", "/token", "/trainings", "/projects", "/workloads"]),
    headers=st.sampled_from([{}, {"Retry-After": "1"}, {"Location": "http://127.0.0.1:1/"}]),
    times=st.integers(1, 4),
)
VERBS = [
    "submit",
    "submit another",
    "get",
    "list",
    "document",
    "cancel",
    "suspend",
    "resume",
    "events",
    "history",
]


def ask(backend: Backend, verb: str) -> object:
    match verb:
        case "submit":
            return backend.submit(RUN)
        case "submit another":
            return backend.submit(OTHER)
        case "list":
            return backend.list()
        case "cancel" | "suspend":
            return getattr(backend, verb)(NAME, timeout_s=0)
    return getattr(backend, verb)(NAME)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from(VERBS)),
        st.tuples(st.just("fault"), FAULTS),
        st.tuples(
            st.just("phase"), st.sampled_from(["Running", "Failed", "Completed", "Stopped", "Pending"])
        ),
        st.tuples(st.just("expire"), st.none()),
    ),
    min_size=3,
    max_size=14,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, tells_variables=st.booleans(), unique_names=st.booleans())
def test_no_sequence_of_faults_makes_two_trainings_or_shows_a_secret(
    caplog: pytest.LogCaptureFixture,
    steps: list[tuple[str, Any]],
    tells_variables: bool,
    unique_names: bool,
) -> None:
    """Of submits one after the other, even where the server would take a name twice."""
    with RunaiStub() as stub, caplog.at_level(logging.DEBUG):
        stub.tells_variables, stub.unique_names = tells_variables, unique_names
        backend = backend_for(stub)
        shown: list[str] = []
        for kind, what in steps:
            if kind == "fault":
                stub.faults.append(replace(what))
            elif kind == "phase":
                for workload in stub.live():
                    if workload["phase"] not in ("Failed", "Completed"):
                        stub.set_phase(workload["name"], what)
            elif kind == "expire":
                stub.expire_tokens()
            else:
                try:
                    shown.append(repr(ask(backend, what)))
                except (LauncherError, RunDirError) as error:
                    shown.append(everything_told(error))
            under_way = [w for w in stub.live() if w["phase"] not in ("Failed", "Completed")]
            assert len(under_way) <= 1
        names = [workload["name"] for workload in stub.workloads]
        assert sorted(names) == sorted([NAME, *(f"{NAME}-r{n}" for n in range(2, 99))][: len(names)])
        assert_no_secrets(stub, *shown, caplog.text)
        caplog.clear()
        stub.faults.clear()
        # And no run is lost: what was created is seen as soon as the control plane answers again.
        assert (backend.get(NAME).phase is Phase.ABSENT) == (not stub.workloads)
        assert set(backend.list()) == ({NAME} if stub.workloads else set())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from([NAME, PROJECT, "Running", "2026-02-21T09:30:00Z"]),
    lambda below: st.lists(below, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["workloads", "projects", "next", "id", "name", "projectName", "phase", "phaseMessage", "spec",
             "labels", "environmentVariables", "value", "clusterId", "accessToken", "events", "records",
             "pods", "meta", "createdAt", "INFL_RUN_JSON", "deletedAt", "runningPods", "message"]
        ),
        below,
        max_size=6,
    ),
    max_leaves=12,
)  # fmt: skip
WORKLOAD_KEYS = ("phase", "phaseMessage", "deletedAt", "environmentVariables", "createdAt", "runningPods",
                 "phaseReason")  # fmt: skip
WORKLOAD = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["a", 3, "../x", ""]),
        "name": st.sampled_from([NAME, f"{NAME}-r2", "x"]),
        "projectName": st.just(PROJECT),
    },
    optional=dict.fromkeys(WORKLOAD_KEYS, JSON),
)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[RunaiStub]:
    with RunaiStub() as served:
        yield served


@settings(max_examples=60, deadline=None)
@given(
    body=JSON | st.builds(lambda each: {"workloads": each}, st.lists(WORKLOAD, max_size=3)),
    part=st.sampled_from(["/workloads", "/trainings", "/projects", "/token", "/events", "/history", "/pods"]),
    verb=st.sampled_from(VERBS),
)
def test_json_of_any_shape_is_an_error_in_words_and_never_a_traceback(
    fuzzed: RunaiStub, body: Any, part: str, verb: str
) -> None:
    fuzzed.workloads.clear()
    fuzzed.faults.clear()
    backend = backend_for(fuzzed)
    backend.submit(RUN)
    fuzzed.faults.append(Fault("shape", part=part, body=json.dumps(body).encode(), times=50))
    with contextlib.suppress(LauncherError, RunDirError):
        ask(backend_for(fuzzed), verb)


def test_the_property_would_notice_an_order_that_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that does not keep names unique, and a client that repeats: two trainings."""
    from launcher.backends.runai_client import RunaiClient

    sent_once = RunaiClient._call
    with RunaiStub() as stub:
        stub.unique_names = False
        monkeypatch.setattr(
            RunaiClient,
            "_call",
            lambda self, *args, **named: sent_once(self, *args, **{**named, "once": False}),
        )
        stub.faults.append(Fault("502", after=True, method="POST", part="/trainings"))
        with pytest.raises(LauncherError, match="several workloads") as caught:
            backend_for(stub).submit(RUN)
            backend_for(stub).submit(RUN)
        assert caught.value.next_step
        assert len(stub.workloads) == 2
