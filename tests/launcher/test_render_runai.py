"""The training of Run:ai for each preset: golden files, and what is derived from the spec.

After a wanted change run this file with ``INFL_UPDATE_GOLDEN=1`` and read the difference.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from influence.rundir.spec import RunSpec
from launcher.errors import SpecError
from launcher.presets import PresetLibrary
from launcher.render import render_template
from launcher.runai_values import LOOKED_UP, PRIORITY_CLASSES, TEMPLATE, training_values
from tests.launcher.test_render import ANY_TEXT, kubelet_expands
from tests.launcher.test_render_job import run_of, shape, with_texts

GOLDEN = Path(__file__).parent / "golden" / "runai"
LIBRARY = PresetLibrary()
CASES = [
    (preset.name, overlays)
    for preset in LIBRARY.presets()
    for overlays in [(), *((file.name,) for file in LIBRARY.overlays())]
    if run_of(preset.name, overlays).spec["hardware"]["nodes"] == 1
]
CASE_IDS = ["-".join((preset, *overlays)) for preset, overlays in CASES]


def rendered(run: RunSpec, **ids: str) -> str:
    return render_template(TEMPLATE, training_values(run, **ids))


def training_of(preset: str, overlays: tuple[str, ...] = (), *sets: str) -> dict[str, Any]:
    training: dict[str, Any] = json.loads(rendered(run_of(preset, overlays, *sets)))
    return training


def variables_of(training: dict[str, Any]) -> dict[str, Any]:
    entries = training["spec"]["environmentVariables"]
    assert len({entry["name"] for entry in entries}) == len(entries)
    return {entry["name"]: next(value for key, value in entry.items() if key != "name") for entry in entries}


@pytest.mark.parametrize(("preset", "overlays"), CASES, ids=CASE_IDS)
def test_the_training_is_the_golden_one(preset: str, overlays: tuple[str, ...]) -> None:
    """The run document and its hash have tests of their own; the golden files leave them out."""
    run = run_of(preset, overlays)
    text = rendered(run).replace(run.spec_hash, "sha256:...").replace(run.spec_hash[7:39], "...")
    text, count = re.subn(r'("INFL_RUN_JSON", "value": )".*"},$', r'\1"..."},', text, flags=re.MULTILINE)
    assert count == 1
    path = GOLDEN / f"{'-'.join((preset, *overlays))}.json"
    if os.environ.get("INFL_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
    json.loads(text)  # strictly JSON, and not only YAML


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(CASE_IDS)


def test_ids_are_looked_up_at_submit_and_a_render_says_so() -> None:
    offline = training_of("smoke")
    assert offline["projectId"] == offline["clusterId"] == LOOKED_UP
    online = json.loads(rendered(run_of("smoke"), project_id="4501", cluster_id="c-1", name="infl-x-r2"))
    assert (online["projectId"], online["clusterId"], online["name"]) == ("4501", "c-1", "infl-x-r2")
    assert online["useGivenNameAsPrefix"] is False, "the server must refuse a second one of the name"


def test_the_retries_are_the_specs() -> None:
    spec = training_of("smoke", (), "retry.backoff_limit=7", "retry.grace_period_s=5")["spec"]
    assert (spec["backoffLimit"], spec["terminationGracePeriodSeconds"]) == (7, 5)
    assert spec["restartPolicy"] == "Never"
    assert spec["terminateAfterPreemption"] is False, "a preempted run goes on later"


def test_resources_are_in_run_ais_units() -> None:
    assert training_of("alltoken-timing")["spec"]["compute"] == {
        "gpuDevicesRequest": 8, "cpuCoreRequest": 96, "cpuCoreLimit": 96,
        "cpuMemoryRequest": "1500Gi", "cpuMemoryLimit": "1500Gi", "largeShmRequest": True,
    }  # fmt: skip
    on_cpu = training_of("alltoken-timing", ("tiny-cpu",))["spec"]
    assert on_cpu["compute"]["gpuDevicesRequest"] == 0
    assert not {"tolerations", "nodeAffinityRequired"} & set(on_cpu)
    devices = training_of("smoke", (), "cluster.extended_resources={rdma/ib: 2}")["spec"]["compute"]
    assert devices["extendedResources"] == [{"resource": "rdma/ib", "quantity": "2"}]


def test_placement_comes_from_the_cluster_settings() -> None:
    spec = training_of(
        "smoke", (), "cluster.node_pools=[h200, spare]", "cluster.priority_class=high",
        "cluster.preemptible=false", "cluster.node_selector={zone: a}", "cluster.image_pull_secrets=[one]",
        "cluster.tolerations=[{key: a, operator: Equal, value: b, effect: NoExecute, tolerationSeconds: 3},"
        " {key: c, operator: Exists}]",
    )["spec"]  # fmt: skip
    assert spec["nodePools"] == ["h200", "spare"]
    assert (spec["priorityClass"], spec["preemptibility"]) == ("high", "non-preemptible")
    assert spec["imagePullSecrets"] == [{"name": "one"}]
    (term,) = spec["nodeAffinityRequired"]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [
        {"key": "nvidia.com/gpu.product", "operator": "In", "values": ["NVIDIA-H200"]},
        {"key": "zone", "operator": "In", "values": ["a"]},
    ]
    assert spec["tolerations"] == [
        {"key": "a", "operator": "Equal", "effect": "NoExecute", "value": "b", "seconds": 3},
        {"key": "c", "operator": "Exists", "effect": "Any"},
    ]
    plain = training_of("smoke", (), "hardware.gpu_product=null")["spec"]
    assert plain["preemptibility"] == "preemptible"
    assert not {"nodePools", "priorityClass", "imagePullSecrets", "nodeAffinityRequired"} & set(plain)


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ("cluster.priority_class=urgent", "Run:ai has no class 'urgent'"),
        ("cluster.tolerations=[{operator: Exists}]", "a toleration of one key only"),
        (f"verl.+trainer.note={'x' * 100_000}", "100000 is the most on a cluster"),
    ],
)
def test_what_a_training_cannot_say_is_refused(sets: str, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        training_values(run_of("smoke", (), sets))


def test_several_nodes_are_refused_with_the_way_that_works() -> None:
    spec = run_of("smoke").spec
    run = RunSpec.new("infl-x", {**spec, "hardware": {**spec["hardware"], "nodes": 2}}, wandb={"url": None})
    with pytest.raises(SpecError, match="nodes is 2") as caught:
        training_values(run)
    assert "one pod" in str(caught.value.why)
    assert "kuberay" in str(caught.value.next_step)
    assert "runai-<project>" in str(caught.value.next_step)


@pytest.mark.parametrize("name", PRIORITY_CLASSES)
def test_every_priority_of_run_ai_can_be_set(name: str) -> None:
    assert training_of("smoke", (), f"cluster.priority_class={name}")["spec"]["priorityClass"] == name


def test_secrets_come_by_reference_and_only_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("RUNAI_CLIENT_SECRET", "clientsecret-0815")
    online, offline, disabled = (
        training_of("smoke", (), f"wandb.mode={mode}") for mode in ("online", "offline", "disabled")
    )
    assert variables_of(online)["WANDB_API_KEY"] == {"name": "infl-secrets", "key": "WANDB_API_KEY"}
    assert "WANDB_API_KEY" not in {**variables_of(offline), **variables_of(disabled)}
    assert variables_of(offline)["WANDB_RUN_ID"] == variables_of(offline)["INFL_RUN_ID"] == "infl-smoke-0221"
    stored = variables_of(
        training_of("smoke", (), "cluster.storage=object_store", "cluster.object_store=s3://bucket/runs")
    )
    assert stored["INFL_STORE_URL"] == "s3://bucket/runs"
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert stored[key] == {"name": "infl-secrets", "key": key}
    assert not [name for name in variables_of(online) if name.startswith(("AWS", "INFL_STORE"))]
    assert not [name for name in variables_of(disabled) if name.startswith("WANDB")]
    assert not re.search("0123456789" * 4 + "|clientsecret", json.dumps([online, offline, disabled]))


def test_the_trainer_gets_its_run_its_folder_and_the_sites_variables() -> None:
    run = run_of("smoke", (), "model.path=$(POD_UID)/$$x", "cluster.environment={NOTE: '$(HOME)$$'}")
    training = json.loads(rendered(run))
    env = {name: value for name, value in variables_of(training).items() if isinstance(value, str)}
    seen = {name: kubelet_expands(value, {**env, "POD_UID": "!", "x": "!"}) for name, value in env.items()}
    assert RunSpec.from_dict(json.loads(seen["INFL_RUN_JSON"])) == run
    assert seen["NOTE"] == "$(HOME)$$"
    assert [training["spec"]["command"], *shlex.split(training["spec"]["args"])] == [
        "python", "-m", "influence.train", "--run-dir", "/artifacts/infl-smoke-0221",
    ]  # fmt: skip
    assert variables_of(training)["POD_UID"] == {"path": "metadata.uid"}
    assert variables_of(training)["NODE_NAME"] == {"path": "spec.nodeName"}


@pytest.mark.parametrize(
    ("sets", "claims", "scratch"),
    [
        (
            ("cluster.data_claim=corpus",),
            [
                {"existingPvc": True, "claimName": "infl-artifacts", "path": "/artifacts"},
                {"existingPvc": True, "claimName": "corpus", "path": "/data", "readOnly": True},
            ],
            [{"path": "/tmp"}],
        ),
        (
            ("cluster.storage=ephemeral", "cluster.claim=null", "cluster.ephemeral_storage=9Gi"),
            [],
            [{"path": "/tmp"}, {"path": "/artifacts", "sizeLimit": "9Gi"}],
        ),
    ],
)
def test_every_path_that_is_written_lies_on_a_volume(
    sets: tuple[str, ...], claims: list[Any], scratch: list[Any]
) -> None:
    training = training_of("smoke", (), *sets)
    assert training["spec"]["storage"] == {"pvc": claims, "emptyDirVolume": scratch}
    assert training["spec"]["security"]["readOnlyRootFilesystem"] is True
    assert training["spec"]["security"]["runAsNonRoot"] is True
    assert training["spec"]["workingDir"] == "/tmp"
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        assert (variables_of(training)[name] + "/").startswith("/tmp/")


BENIGN = run_of("smoke", (), "cluster.image_pull_secrets=[p]", "cluster.data_claim=d", "wandb.entity=e",
                "cluster.node_pools=[n]", "cluster.environment={A: b}")  # fmt: skip
BENIGN_SHAPE = shape(json.loads(rendered(BENIGN)))


@settings(max_examples=40, deadline=None)
@given(ANY_TEXT.filter(bool))
def test_hostile_text_in_every_field_arrives_unchanged(text: str) -> None:
    spec = with_texts(BENIGN.spec, text)
    for key in ("priority_class", "storage", "scheduler"):
        spec["cluster"][key] = BENIGN.spec["cluster"][key]
    run = RunSpec.new(text, spec, provenance={"user": text}, wandb={**BENIGN.wandb, "url": text})
    training = json.loads(rendered(run))
    body = training["spec"]
    assert shape(training) == BENIGN_SHAPE
    assert training["name"] == text
    assert body["image"] == body["imagePullSecrets"][0]["name"] == body["nodePools"][0] == text
    assert body["labels"][0]["value"] == body["annotations"][1]["value"] == text
    assert body["storage"]["pvc"][0]["claimName"] == body["compute"]["cpuMemoryRequest"] == text
    assert body["tolerations"][0]["key"] == text
    env = variables_of(training)
    assert kubelet_expands(env["A"], {"POD_UID": "!"}) == text
    assert json.loads(kubelet_expands(env["INFL_RUN_JSON"], {"POD_UID": "!"})) == run.to_dict()
    args = shlex.split(kubelet_expands(body["args"], {"POD_UID": "!"}))
    assert args == ["-m", "influence.train", "--run-dir", f"/artifacts/{text}"]
