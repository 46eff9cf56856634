"""What the chart makes, read from its golden files, and what its schema refuses: no helm needed.

``test_helm.py`` holds the golden files to helm itself, and writes them anew.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher import __version__
from launcher.presets import PresetLibrary
from tests.charts.conftest import CHART
from tests.charts.rights import (
    KUBERAY_RIGHTS,
    KUEUE_RIGHTS,
    LAUNCHER_RIGHTS,
    NODE_RIGHTS,
    READER_RIGHTS,
    Rights,
)

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
CORE_GROUPS = ("v1", "rbac.authorization.k8s.io/v1")


def documents(case: str) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all((GOLDEN / f"{case}.yaml").read_text()) if d is not None]


def of_kind(case: str, kind: str) -> list[dict[str, Any]]:
    return [d for d in documents(case) if d["kind"] == kind]


def rights(role: dict[str, Any]) -> Rights:
    """A role's rules as a table; a rule may not name objects, or the table would say too much."""
    table: Rights = {}
    for rule in role["rules"]:
        assert set(rule) == {"apiGroups", "resources", "verbs"}
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                assert (group, resource) not in table, "a right is granted in one place"
                table[group, resource] = set(rule["verbs"])
    return table


def role(case: str, kind: str, suffix: str) -> dict[str, Any]:
    (found,) = [d for d in of_kind(case, kind) if d["metadata"]["name"].endswith(suffix)]
    return found


def schema_errors(values: dict[str, Any]) -> list[str]:
    return [error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(values)]


def test_chart_is_of_the_packages_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
    assert chart["apiVersion"] == "v2"
    assert chart["kubeVersion"] == ">=1.31.0-0"


def test_defaults_fit_the_shipped_presets() -> None:
    cluster = PresetLibrary().resolve("base").settings["cluster"]
    assert VALUES["trainer"]["serviceAccount"]["name"] == cluster["service_account"]
    assert VALUES["artifacts"]["name"] == cluster["claim"]
    assert VALUES["existingSecret"] == cluster["secret"]
    assert VALUES["profile"]["image"] == cluster["image"]
    assert cluster["image"].endswith(f":{__version__}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_core_kinds_are_valid_strictly(case: str, version: str) -> None:
    core = [d for d in documents(case) if d["apiVersion"] in CORE_GROUPS]
    assert core
    for document in core:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("case", CASES)
def test_every_object_has_the_recommended_labels_and_its_place(case: str) -> None:
    names = set()
    for document in documents(case):
        metadata = document["metadata"]
        labels = metadata["labels"]
        assert {f"app.kubernetes.io/{key}" for key in ("name", "instance", "version", "managed-by")} < set(
            labels
        )
        assert labels["app.kubernetes.io/version"] == __version__
        assert all(len(str(value)) <= 63 for value in labels.values())
        assert len(metadata["name"]) <= 253
        cluster_scoped = document["kind"] in ("ClusterRole", "ClusterRoleBinding", "Queue")
        assert ("namespace" in metadata) is not cluster_scoped
        names.add((document["kind"], metadata["name"]))
    assert len(names) == len(documents(case))


def test_launcher_has_exactly_the_rights_it_needs() -> None:
    assert rights(role("default", "Role", "-launcher")) == LAUNCHER_RIGHTS
    assert rights(role("kuberay", "Role", "-launcher")) == LAUNCHER_RIGHTS | KUBERAY_RIGHTS
    assert rights(role("kueue", "Role", "-launcher")) == LAUNCHER_RIGHTS | KUEUE_RIGHTS
    assert rights(role("everything", "Role", "-launcher")) == LAUNCHER_RIGHTS | KUBERAY_RIGHTS | KUEUE_RIGHTS


def test_no_role_reaches_secrets_nor_uses_wildcards() -> None:
    for case in CASES:
        for found in [*of_kind(case, "Role"), *of_kind(case, "ClusterRole")]:
            for (group, resource), verbs in rights(found).items():
                assert resource != "secrets"
                assert "*" not in {group, resource, *verbs}


def test_reader_and_node_viewer_are_off_unless_asked_for() -> None:
    assert [d["metadata"]["name"] for d in of_kind("default", "Role")] == ["infl-influence-launcher"]
    assert not of_kind("default", "ClusterRole")
    assert {d["metadata"]["name"] for d in of_kind("default", "ServiceAccount")} == {
        "infl-launcher",
        "infl-trainer",
    }
    assert rights(role("everything", "Role", "-reader")) == READER_RIGHTS
    assert rights(role("everything", "ClusterRole", "node-viewer")) == NODE_RIGHTS


@pytest.mark.parametrize("case", CASES)
def test_bindings_bind_a_role_that_exists_and_never_the_trainer(case: str) -> None:
    roles = {(d["kind"], d["metadata"]["name"]) for d in documents(case)}
    bindings = [*of_kind(case, "RoleBinding"), *of_kind(case, "ClusterRoleBinding")]
    trainer = "gpu-jobs" if case == "existing" else "infl-trainer"
    for binding in bindings:
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in roles
        assert all(isinstance(subject["name"], str) for subject in binding["subjects"])
        assert trainer not in [subject["name"] for subject in binding["subjects"]]


@pytest.mark.parametrize("case", CASES)
def test_no_account_carries_a_token(case: str) -> None:
    assert all(d["automountServiceAccountToken"] is False for d in of_kind(case, "ServiceAccount"))


@pytest.mark.parametrize("case", CASES)
def test_the_claim_outlives_the_release(case: str) -> None:
    claims = of_kind(case, "PersistentVolumeClaim")
    assert len(claims) == (0 if case == "existing" else 1)
    for claim in claims:
        assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_no_secret_passes_through_the_chart() -> None:
    assert not [d for case in CASES for d in of_kind(case, "Secret")]
    keys = {key for _, part in objects(VALUES) for key in part}
    assert not [key for key in keys if re.search(r"(?i)password|token|key|credential", key)]
    # Names of Secrets are all that is asked for.
    assert {key for key in keys if "ecret" in key} == {"existingSecret", "imagePullSecrets"}


def test_the_claim_is_what_the_values_say() -> None:
    (claim,) = of_kind("default", "PersistentVolumeClaim")
    assert claim["metadata"]["name"] == VALUES["artifacts"]["name"]
    assert claim["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "2Ti"}},
    }
    (everything,) = of_kind("everything", "PersistentVolumeClaim")
    assert everything["spec"]["storageClassName"] == "", "'-' asks for no class, which is not the default one"


# -- the schema -------------------------------------------------------------------------------------------


def objects(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every mapping below a value, with the path to it."""
    if isinstance(value, dict):
        yield path, value
        for key, below in value.items():
            yield from objects(below, (*path, key))


def with_value(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(VALUES)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


#: Mappings whose keys are the user's.
FREE = {"commonLabels", "annotations"}


def test_schema_is_draft_7_and_closed_everywhere() -> None:
    assert SCHEMA["$schema"] == "http://json-schema.org/draft-07/schema#"
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    for path, part in objects(SCHEMA):
        if part.get("type") == "object" and path[-1:] != ("global",):
            assert "additionalProperties" in part, path
            assert part["additionalProperties"] is False or "properties" not in part, path


def test_defaults_fit_the_schema_and_global_is_free() -> None:
    assert schema_errors(VALUES) == []
    assert schema_errors(VALUES | {"global": {"anything": {"at": "all"}}}) == []


@pytest.mark.parametrize(
    "path",
    [path for path, _ in objects(VALUES) if not FREE & set(path)],
    ids=lambda path: ".".join(path) or "top",
)
def test_unknown_values_are_refused_at_every_level(path: tuple[str, ...]) -> None:
    assert schema_errors(with_value((*path, "unheardOf"), 1))


@pytest.mark.parametrize(
    "path",
    [
        (*path, key)
        for path, part in objects(VALUES)
        for key, value in part.items()
        if not isinstance(value, dict)
    ],
    ids=".".join,
)
def test_every_value_is_typed(path: tuple[str, ...]) -> None:
    """No value of the chart takes both a mapping and a number."""
    assert schema_errors(with_value(path, {"a": "mapping"}))
    old: Any = VALUES
    for key in path:
        old = old[key]
    if not isinstance(old, int | float) or isinstance(old, bool):
        assert schema_errors(with_value(path, 7))


NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
#: Python's `$`, unlike that of Helm's Go, matches before a last newline.
ANY_TEXT = st.text(max_size=300).filter(lambda text: not text.endswith("\n"))
NAMED = [
    ("launcher", "serviceAccount", "name"),
    ("trainer", "serviceAccount", "name"),
    ("reader", "serviceAccount", "name"),
    ("artifacts", "name"),
    ("existingSecret",),
]


@pytest.mark.parametrize("path", NAMED, ids=".".join)
@given(name=ANY_TEXT | st.from_regex(NAME, fullmatch=True))
def test_only_names_of_kubernetes_are_names(path: tuple[str, ...], name: str) -> None:
    good = len(name) <= 253 and NAME.fullmatch(name) is not None
    assert (schema_errors(with_value(path, name)) == []) is good


@given(size=ANY_TEXT | st.from_regex(r"-?[0-9]{1,4}(\.[0-9]+)?([KMGTP]i?|m|e3)?", fullmatch=True))
def test_only_sizes_that_kubernetes_reads_as_megabytes_or_more_are_sizes(size: str) -> None:
    from influence.machine import parse_bytes

    if schema_errors(with_value(("artifacts", "size"), size)) == []:
        assert parse_bytes(size) >= 10**6


@pytest.mark.parametrize("size", ["2Ti", "500Gi", "1.5Ti", "10T"])
def test_usual_sizes_are_sizes(size: str) -> None:
    assert schema_errors(with_value(("artifacts", "size"), size)) == []


@pytest.mark.parametrize("size", ["", "0", "0Gi", "-1Gi", "500", "5 Gi", "5GB", "5gi", "1e3Gi"])
def test_bad_sizes_are_refused(size: str) -> None:
    assert schema_errors(with_value(("artifacts", "size"), size))


@pytest.mark.parametrize(
    "subject",
    [
        {"kind": "Robot", "name": "x"},
        {"kind": "User"},
        {"name": "ada"},
        {"kind": "User", "name": ""},
        {"kind": "User", "name": "ada", "namespace": "research"},
        {"kind": "ServiceAccount", "name": "Not_A_Name"},
    ],
    ids=json.dumps,
)
def test_bad_subjects_are_refused(subject: dict[str, str]) -> None:
    assert schema_errors(with_value(("launcher", "subjects"), [subject]))


def test_a_local_queue_needs_its_cluster_queue() -> None:
    assert schema_errors(with_value(("kueue", "localQueue", "create"), True))


@pytest.mark.parametrize("key", ["app.kubernetes.io/name", "helm.sh/chart"])
def test_the_charts_own_labels_cannot_be_replaced(key: str) -> None:
    assert schema_errors(with_value(("commonLabels",), {key: "x"}))
    assert schema_errors(with_value(("commonLabels",), {"team": "x"})) == []
