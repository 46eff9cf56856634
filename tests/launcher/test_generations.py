"""Names and groups of a run's objects, and the run document that they carry."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from influence.rundir.names import MAX_RUN_NAME, validate_run_name
from launcher.backends.generations import generation_number, generations_by_run, object_name
from launcher.backends.run_document import document_of_pod, read_document
from launcher.errors import BackendError
from launcher.kubernetes_values import RUN_LABEL
from tests.launcher.test_render_job import env_of, pod_of, rendered, run_of

NAMES = st.from_regex(rf"[a-z][a-z0-9-]{{0,{MAX_RUN_NAME - 2}}}[a-z0-9]", fullmatch=True)


def item(name: str, run: str | None, **metadata: Any) -> dict[str, Any]:
    labels = {} if run is None else {"labels": {RUN_LABEL: run}}
    return {"metadata": {"name": name, **labels, **metadata}}


@given(NAMES, st.integers(1, 10**6))
def test_a_generation_is_read_back_from_its_name(run: str, number: int) -> None:
    validate_run_name(run)
    name = object_name(run, number)
    assert generation_number(run, name) == number
    assert len(name) <= 63


@given(NAMES, NAMES)
def test_another_runs_name_is_no_generation_unless_it_looks_like_one(run: str, other: str) -> None:
    number = generation_number(run, other)
    assert number is None or object_name(run, number) == other


def test_objects_are_grouped_by_their_label_the_oldest_first() -> None:
    items = [
        item("a-r10", "a"), item("a", "a"), item("a-r2", "a"),
        item("a-r3", "a-r3"),  # a run of that very name
        item("b", None), item("c-r1", "c"), item("c-r02", "c"), item("other", "c"),
        item("d", "d", ownerReferences=[{"kind": "RayJob", "name": "d", "controller": True}]),
        {"metadata": {}}, {},
    ]  # fmt: skip
    found = generations_by_run(items)
    assert {run: [g.name for g in generations] for run, generations in found.items()} == {
        "a": ["a", "a-r2", "a-r10"],
        "a-r3": ["a-r3"],
    }
    assert [g.number for g in found["a"]] == [1, 2, 10]


@given(st.text(max_size=50).filter(lambda t: "\0" not in t and t.isprintable()))
def test_a_run_is_read_back_from_the_job_that_was_rendered(text: str) -> None:
    run = run_of("smoke", (), "model.path=$$(HOME)$x$$")
    run.provenance["note"] = text
    job = yaml.safe_load(rendered(run))
    assert document_of_pod(pod_of(job), run=run.run, where="Job x") == run


def test_an_environment_without_a_run_or_with_an_altered_one_is_no_run() -> None:
    with pytest.raises(BackendError, match="Job x is no run"):
        read_document([{"name": "HOME", "value": "/tmp"}], where="Job x")
    with pytest.raises(BackendError, match="Job x is no run"):
        document_of_pod({}, run="x", where="Job x")
    text = env_of(yaml.safe_load(rendered(run_of("smoke"))))["INFL_RUN_JSON"]
    for altered in (text[:-1], text.replace('"total_steps":', '"total_stepz":'), "[]", "[" * 60_000):
        with pytest.raises(BackendError, match="cannot be used"):
            read_document([{"name": "INFL_RUN_JSON", "value": altered}], where="Job x")


def test_a_copied_object_is_not_the_run_that_it_was_copied_from() -> None:
    pod = pod_of(yaml.safe_load(rendered(run_of("smoke"))))
    for label in ("infl-copy", None, 5):
        with pytest.raises(BackendError, match="its label names the run"):
            document_of_pod(pod, run=label, where="Job x")
