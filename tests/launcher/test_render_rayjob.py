"""The RayJob of each preset: golden files, the CRD's own schema, and what is derived from the spec.

After a wanted change run this file with ``INFL_UPDATE_GOLDEN=1`` and read the difference.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings

from influence.rundir.spec import RunSpec
from launcher import kuberay_values
from launcher.kuberay_values import TEMPLATE, rayjob_values
from launcher.kubernetes_values import job_values
from launcher.presets import PresetLibrary
from launcher.render import render_template
from tests.launcher.test_render import ANY_TEXT, kubelet_expands
from tests.launcher.test_render_job import container_of_template as container_of
from tests.launcher.test_render_job import env_of_template as env_of
from tests.launcher.test_render_job import require_golden, run_of, shape, with_texts

_SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the CRD is a megabyte
GOLDEN = Path(__file__).parent / "golden" / "kuberay"
PRESETS = [file.name for file in PresetLibrary().presets()]
OVERLAYS: list[tuple[str, ...]] = [(), *((file.name,) for file in PresetLibrary().overlays())]
VARIANTS: dict[str, tuple[str, ...]] = {
    "kai": ("cluster.scheduler=kai", "cluster.queue=infl", "cluster.priority_class=train"),
    "kueue": ("cluster.scheduler=kueue", "cluster.queue=research", "cluster.data_claim=corpus"),
}
CASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "-".join((preset, *overlays)): (preset, overlays, ()) for preset in PRESETS for overlays in OVERLAYS
}
CASES |= {f"alltoken-2node-{name}": ("alltoken-2node", (), sets) for name, sets in VARIANTS.items()}


def rendered(run: RunSpec) -> str:
    return render_template(TEMPLATE, rayjob_values(run))


def rayjob_of(preset: str, overlays: tuple[str, ...] = (), *sets: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(rendered(run_of(preset, overlays, *sets)))
    return document


def templates_of(rayjob: dict[str, Any]) -> list[dict[str, Any]]:
    """The head's pod template, then the worker group's."""
    cluster = rayjob["spec"]["rayClusterSpec"]
    return [
        cluster["headGroupSpec"]["template"],
        *(g["template"] for g in cluster.get("workerGroupSpecs", [])),
    ]


@pytest.mark.parametrize("case", CASES)
def test_the_rayjob_is_the_golden_one(case: str) -> None:
    preset, overlays, sets = CASES[case]
    run = run_of(preset, overlays, *sets)
    require_golden(GOLDEN / f"{case}.yaml", rendered(run), run)


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(CASES)


@cache
def schema() -> dict[str, Any]:
    """KubeRay's CRD from the Go module cache or the test bench's; both have it by its module's checksum."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "influence-launcher"
    modules = Path(os.environ.get("GOMODCACHE") or Path.home() / "go" / "pkg" / "mod")
    name = "config/crd/bases/ray.io_rayjobs.yaml"
    places = [
        *sorted(modules.glob(f"github.com/ray-project/kuberay/ray-operator@*/{name}")),
        *sorted(caches.glob("crds-*/kuberay/**/ray.io_rayjobs.yaml")),
    ]
    if not places:
        pytest.skip("KubeRay's CRDs are not here (make controlplane downloads them)")
    crd = yaml.load(places[-1].read_text(), _SAFE_LOADER)  # noqa: S506 - one of the two safe ones
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
    return strict(version["schema"]["openAPIV3Schema"])


def strict(node: Any) -> Any:
    """The schema as a server's strict field validation reads it: no field that it does not name."""
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    below = {key: strict(value) for key, value in node.items() if key != "description"}
    if node.get("x-kubernetes-int-or-string") is True:
        return {"type": ["integer", "string"]}
    if node.get("type") == "object" and isinstance(node.get("properties"), dict):
        below.setdefault("additionalProperties", bool(node.get("x-kubernetes-preserve-unknown-fields")))
        if set(node["properties"]) == {"apiVersion", "kind", "metadata", "spec", "status"}:
            below["properties"] |= {"metadata": {"type": "object"}}  # the server's own
    return below


@pytest.mark.parametrize("case", CASES)
def test_the_rayjob_fits_the_crd(case: str) -> None:
    everything = (
        "cluster.data_claim=infl-data", "cluster.image_pull_secrets=[a, b]", "cluster.priority_class=high",
        "cluster.tolerations=[{key: a, operator: Equal, value: b, effect: NoExecute, tolerationSeconds: 3}]",
        "cluster.environment={NCCL_IB_HCA: mlx5}", "cluster.extended_resources={rdma/ib: 1}",
    )  # fmt: skip
    preset, overlays, sets = CASES[case]
    for more in ((), everything):
        jsonschema.validate(rayjob_of(preset, overlays, *sets, *more), schema())


@pytest.mark.parametrize("place", ["spec", "pod"])
def test_the_crd_would_find_a_mistake(place: str) -> None:
    rayjob = rayjob_of("alltoken-2node")
    where = rayjob["spec"] if place == "spec" else templates_of(rayjob)[1]["spec"]
    where["backofLimit"] = 3
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        jsonschema.validate(rayjob, schema())


def test_a_node_is_a_pod_and_the_head_is_one_of_them() -> None:
    two = rayjob_of("alltoken-2node")["spec"]["rayClusterSpec"]
    (group,) = two["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 1)
    for template in templates_of({"spec": {"rayClusterSpec": two}}):
        assert container_of(template)["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert "workerGroupSpecs" not in rayjob_of("alltoken-timing")["spec"]["rayClusterSpec"]
    four = rayjob_of("alltoken-2node", (), "hardware.nodes=4")["spec"]["rayClusterSpec"]
    assert four["workerGroupSpecs"][0]["replicas"] == 3


def test_the_pods_are_those_of_the_job() -> None:
    """What a Job's pod has, each pod of the Ray cluster has; KubeRay adds the command."""
    sets = ("cluster.scheduler=kai", "cluster.queue=q", "cluster.data_claim=d", "cluster.priority_class=p")
    job = yaml.safe_load(render_template("kubernetes/job.yaml.j2", job_values(run_of("smoke", (), *sets))))
    expected = job["spec"]["template"]
    for template in templates_of(rayjob_of("smoke", (), *sets)):
        assert template["metadata"] == expected["metadata"]
        # The trainer there is Ray's child, never PID 1; a preStop hook stops it.
        assert set(template["spec"]) == set(expected["spec"]) - {"shareProcessNamespace"}
        for key in set(template["spec"]) - {"containers"}:
            assert template["spec"][key] == expected["spec"][key], key
        own, its = container_of(template), container_of(expected)
        assert set(own) == set(its) - {"command", "args"} | {"lifecycle"}
        for key in set(its) - {"command", "args", "env"}:
            assert own[key] == its[key], key
        added = {name for name in env_of(template) if name not in env_of(expected)}
        assert {name for name in added if not name.startswith("RAY_")} == {"INFL_CONSOLE"}
        assert set(env_of(expected)) - set(env_of(template)) == {"JOB_UID"}


def test_head_and_workers_differ_in_what_only_a_driver_needs() -> None:
    head, worker = templates_of(rayjob_of("alltoken-2node"))
    assert set(env_of(head)) - set(env_of(worker)) == {"INFL_RUN_JSON", "INFL_CONSOLE"}
    assert "lifecycle" in container_of(head)
    assert "lifecycle" not in container_of(worker)


def test_the_limits_are_the_specs() -> None:
    spec = rayjob_of(
        "alltoken-2node", (), "retry.backoff_limit=7", "retry.deadline_s=99", "retry.grace_period_s=5"
    )["spec"]
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"]) == (7, 99)
    assert spec["preRunningDeadlineSeconds"] <= spec["activeDeadlineSeconds"]
    for template in templates_of({"spec": spec}):
        assert template["spec"]["terminationGracePeriodSeconds"] == 5
        assert template["spec"]["restartPolicy"] == "Never"
        assert env_of(template)["RAY_JOB_STOP_WAIT_TIME_S"] == "5"
    assert spec["shutdownAfterJobFinishes"] is True, "or the GPUs are kept, and nothing can be suspended"


def test_ray_gets_what_the_trainer_would_give_it() -> None:
    environment = pytest.importorskip("influence.verl_engine.environment").ray_environment()
    overrides = pytest.importorskip("influence.verl_engine.overrides")
    ours = kuberay_values.ray_environment(120)
    for name in set(ours) - {"RAY_JOB_STOP_WAIT_TIME_S"}:
        assert ours[name] == environment[name], name
    for preset, overlays in (("alltoken-2node", ()), ("alltoken-2node", ("tiny-cpu",)), ("smoke", ())):
        run = run_of(preset, overlays)
        hardware = run.spec["hardware"]
        params = rayjob_values(run)["worker_params"]
        assert params["num-gpus"] == str(hardware["ranks_per_node"])
        num_ranks = hardware["nodes"] * hardware["ranks_per_node"]
        assert hardware["nodes"] * int(params["num-cpus"]) >= overrides.num_logical_cpus(num_ranks)
    assert params["object-store-memory"] == str(128 * 2**30)


def test_the_version_of_ray_is_the_one_that_is_tested() -> None:
    text = (Path(__file__).parents[2] / "constraints.txt").read_text()
    (version,) = re.findall(r"^ray(?:\[[a-z,]*\])?==(\S+)$", text, flags=re.MULTILINE)
    assert version == kuberay_values.RAY_VERSION


def test_kueue_holds_the_rayjob_back_and_no_one_else_does() -> None:
    assert rayjob_of("alltoken-2node", (), *VARIANTS["kueue"])["spec"]["suspend"] is True
    assert "suspend" not in rayjob_of("alltoken-2node", (), *VARIANTS["kai"])["spec"]


def test_a_later_generation_is_the_same_run() -> None:
    run = run_of("alltoken-2node")
    rayjob = yaml.safe_load(render_template(TEMPLATE, rayjob_values(run, object_name=f"{run.run}-r2")))
    assert rayjob["metadata"]["name"] == "infl-alltoken-2node-0221-r2"
    assert rayjob["metadata"]["labels"]["infl/run"] == run.run
    assert rayjob["spec"]["entrypoint"].endswith("/artifacts/infl-alltoken-2node-0221")


SETS = ("cluster.data_claim=d", "cluster.image_pull_secrets=[p]", "wandb.entity=e")
BENIGN = run_of("alltoken-2node", (), *SETS)
BENIGN_SHAPE = shape(yaml.safe_load(rendered(BENIGN)))


@settings(max_examples=40, deadline=None)
@given(ANY_TEXT.filter(bool))
def test_hostile_text_in_every_field_arrives_unchanged(text: str) -> None:
    spec = with_texts(BENIGN.spec, text)
    spec["hardware"]["shared_memory"] = "256Gi"  # half of it is given to Ray
    run = RunSpec.new(text, spec, provenance={"user": text}, wandb={**BENIGN.wandb, "url": text})
    rayjob = yaml.safe_load(rendered(run))
    assert shape(rayjob) == BENIGN_SHAPE
    assert rayjob["metadata"]["name"] == rayjob["metadata"]["labels"]["infl/run"] == text
    # KubeRay's shell reads the entry point: these words, and nothing else, come out of it.
    expected = ["exec", "python", "-m", "influence.train", "--run-dir", f"/artifacts/{text}"]
    assert shlex.split(rayjob["spec"]["entrypoint"]) == expected
    head, worker = templates_of(rayjob)
    for template in (head, worker):
        container, env = container_of(template), env_of(template)
        assert container["image"] == template["spec"]["serviceAccountName"] == text
        assert env["WANDB_API_KEY"]["secretKeyRef"]["name"] == text
        assert kubelet_expands(env["INFL_RUN_ID"], {"POD_UID": "!"}) == text
    hook = container_of(head)["lifecycle"]["preStop"]["exec"]["command"]
    assert kubelet_expands(hook[-1], {"POD_UID": "!"}) == f"/artifacts/{text}"
    assert json.loads(kubelet_expands(env_of(head)["INFL_RUN_JSON"], {"POD_UID": "!"})) == run.to_dict()
