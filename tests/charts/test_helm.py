"""Helm's own word on the chart: lint, templates against the golden files, values that are refused.

``INFL_UPDATE_GOLDEN=1`` writes the golden files anew.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from launcher.launcher_yaml import read_clusters
from launcher.presets import PresetLibrary
from tests.charts.conftest import CHART, Helm, template_words
from tests.charts.test_chart import CASES, GOLDEN, documents
from tests.cluster.bench import programs

pytestmark = pytest.mark.slow


def values_of(case: str) -> Path:
    return CHART / "ci" / f"{case}-values.yaml"


@pytest.mark.parametrize("case", CASES)
def test_lint_is_clean(helm: Helm, case: str) -> None:
    helm("lint", "--strict", CHART, "--kube-version", "1.31.0", "--values", values_of(case))


@pytest.mark.parametrize("case", CASES)
def test_templates_match_the_golden_files(helm: Helm, case: str) -> None:
    text = helm(*template_words(values=[values_of(case)])).stdout
    golden = GOLDEN / f"{case}.yaml"
    if os.environ.get("INFL_UPDATE_GOLDEN"):
        golden.write_text(text)
    expected = golden.read_text() if golden.exists() else ""
    assert text == expected, "\n".join(
        difflib.unified_diff(expected.split("\n"), text.split("\n"), lineterm="")
    )


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(CASES)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("unheardOf=1", "unheardOf"),
        ("launcher.unheardOf=1", "unheardOf"),
        ("artifacts.sise=5Gi", "sise"),
        ("kai.queue.resources.gpu.max=5", "max"),
        ("artifacts.size=5GB", "artifacts"),
        ("artifacts.accessModes={ReadManyWrites}", "accessModes"),
        ("existingSecret=Not_A_Name", "existingSecret"),
        ("secretValue=abc", "secretValue"),
        ("trainer.serviceAccount.name=infl-launcher", "the trainer's pods would have the launcher's rights"),
    ],
)
def test_bad_values_are_refused_with_their_place(helm: Helm, setting: str, words: str) -> None:
    done = helm(*template_words(), "--set", setting, check=False)
    assert done.returncode != 0
    assert words in done.stderr


def test_the_trainer_is_no_subject(helm: Helm, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    for subject, refused in [
        ({"kind": "ServiceAccount", "name": "infl-trainer"}, True),
        ({"kind": "ServiceAccount", "name": "infl-trainer", "namespace": "research"}, True),
        ({"kind": "ServiceAccount", "name": "infl-trainer", "namespace": "another"}, False),
        ({"kind": "User", "name": "infl-trainer"}, False),
    ]:
        values.write_text(json.dumps({"launcher": {"subjects": [subject]}}))
        assert (helm(*template_words(values=[values]), check=False).returncode != 0) is refused


def test_the_reader_is_nobody_else(helm: Helm) -> None:
    shared = ["--set", "reader.serviceAccount.name=infl-launcher"]
    assert helm(*template_words(), *shared, "--set", "reader.enabled=true", check=False).returncode != 0
    helm(*template_words(), *shared)


def test_a_cluster_older_than_the_pod_failure_policy_is_refused(helm: Helm) -> None:
    done = helm("template", "infl", CHART, "--kube-version", "1.30.9", check=False)
    assert done.returncode != 0
    assert "kubeVersion" in done.stderr


def test_names_of_long_releases_stay_short_and_apart(helm: Helm) -> None:
    names = set()
    for release in ("a" * 53, "a" * 52 + "b", "infl", "influence"):
        text = helm("template", release, CHART, "--namespace", "n" * 63, "--kube-version", "1.31.0",
                    "--set", "reader.enabled=true,nodeViewer.enabled=true").stdout  # fmt: skip
        roles = [d for d in yaml.safe_load_all(text) if d and d["kind"] in ("Role", "ClusterRole")]
        assert all(len(d["metadata"]["name"]) <= (63 if d["kind"] == "Role" else 253) for d in roles)
        names |= {(d["kind"], d["metadata"]["name"]) for d in roles}
    assert len(names) == 4 * 3


@pytest.mark.parametrize(
    "text", ["yes", "1", "null", "a: b", "{}", "'", '"', "x\ny: z", "{{ .Values }}", "#"]
)
def test_a_text_stays_one_text(helm: Helm, tmp_path: Path, text: str) -> None:
    """Whatever a user's name holds, it ends up as that name and nothing else."""
    values = tmp_path / "values.yaml"
    values.write_text(
        json.dumps(
            {
                "launcher": {
                    "subjects": [{"kind": "User", "name": text}],
                    "serviceAccount": {"annotations": {"example.com/note": text}},
                }
            }
        )
    )
    made = [d for d in yaml.safe_load_all(helm(*template_words(values=[values])).stdout) if d]
    (binding,) = [d for d in made if d["kind"] == "RoleBinding"]
    assert binding["subjects"][1]["name"] == text
    (account,) = [d for d in made if d["metadata"]["name"] == "infl-launcher"]
    assert account["metadata"]["annotations"] == {"example.com/note": text}


def notes(helm: Helm, tmp_path: Path, case: str) -> str:
    """What ``helm install`` would print; ``helm template`` leaves it out, so a copy asks for it."""
    chart = tmp_path / "influence"
    shutil.copytree(CHART, chart)
    probe = '{{ dict "notes" (include (print .Template.BasePath "/NOTES.txt") .) | toJson }}\n'
    (chart / "templates" / "probe.yaml").write_text(probe)
    done = helm(*template_words(chart, [values_of(case)]), "--show-only", "templates/probe.yaml")
    text: str = yaml.safe_load(done.stdout)["notes"]
    return text


@pytest.mark.parametrize("case", CASES)
def test_notes_hold_a_profile_that_fits(helm: Helm, tmp_path: Path, case: str) -> None:
    text = notes(helm, tmp_path, case)
    block = text.split("# --- launcher.yaml\n")[1].split("# ---\n")[0].split("\n# ---")[0]
    clusters = yaml.safe_load(block)["clusters"]
    file = tmp_path / "launcher.yaml"
    file.write_text(block)
    described = read_clusters([file])
    for name in described.names:
        PresetLibrary().resolve("alltoken-timing", site=described.profile(name).layer())
    backends = {"lab": "kubernetes", "lab-ray": "kuberay"} if case == "kuberay" else {"lab": "kubernetes"}
    if case != "everything":
        assert {name: profile["backend"] for name, profile in clusters.items()} == backends
    name, profile = next(iter(clusters.items()))
    assert f"launcher doctor --cluster {name}\n" in text
    assert all(each["cluster"] == profile["cluster"] for each in clusters.values())
    names = {d["metadata"]["name"] for d in documents(case)}
    cluster = profile["cluster"]
    assert cluster["namespace"] == "research"
    if case != "existing":
        assert {cluster["service_account"], cluster["claim"]} <= names
    else:
        assert (cluster["service_account"], cluster["claim"]) == ("gpu-jobs", "shared-results")
    assert f"create secret generic {cluster['secret']} " in text
    assert "ready for runs" not in text, "Helm has not looked at the claim"
    assert f"get persistentvolumeclaim {cluster['claim']}\n" in text
    assert "# data_claim: NAME" in block
    if case in ("kai", "kueue"):
        assert (cluster["scheduler"], cluster["queue"]) == (case, "tracing")
    if case != "existing":
        assert "stays when this release is uninstalled" in text


def strict(schema: Any) -> Any:
    """A resource definition's schema that refuses what the API server would silently drop."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


@pytest.mark.parametrize("case", ["kai", "kueue", "everything"])
def test_queues_fit_their_resource_definitions(case: str) -> None:
    try:
        files = [*programs.crds("kai"), *programs.crds("kueue")]
    except programs.NoProgramError as error:
        pytest.skip(str(error))
    definitions = [yaml.safe_load(file.read_text()) for file in files if file.stem.endswith("queues")]
    queues = [d for d in documents(case) if d["kind"] in ("Queue", "LocalQueue")]
    assert queues
    for queue in queues:
        (schema,) = [
            version["schema"]["openAPIV3Schema"]["properties"]["spec"]
            for definition in definitions
            if definition["spec"]["names"]["kind"] == queue["kind"]
            for version in definition["spec"]["versions"]
            if version["served"] and f"{definition['spec']['group']}/{version['name']}" == queue["apiVersion"]
        ]
        jsonschema.Draft7Validator(strict(schema)).validate(queue["spec"])
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft7Validator(strict(schema)).validate(queue["spec"] | {"unheardOf": 1})
