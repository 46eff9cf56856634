"""The Kubernetes Job of each preset: golden files, strict schemas, and what is derived from the spec.

After a wanted change run this file with ``INFL_UPDATE_GOLDEN=1`` and read the difference.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings

from influence.rundir.exits import Verdict, classify
from influence.rundir.spec import RunSpec
from launcher.errors import SpecError
from launcher.git import CodeVersion
from launcher.kubernetes_values import TEMPLATE, job_values, unmet_needs
from launcher.presets import PresetLibrary
from launcher.render import render_template
from launcher.spec import resolve_run
from tests.launcher.test_render import ANY_TEXT, kubelet_expands

GOLDEN = Path(__file__).parent / "golden" / "kubernetes"
PRESETS = [
    file.name
    for file in PresetLibrary().presets()
    if PresetLibrary().resolve(file.name).settings["hardware"]["nodes"] == 1
]
OVERLAYS: list[tuple[str, ...]] = [(), *((file.name,) for file in PresetLibrary().overlays())]
VARIANTS: dict[str, tuple[str, ...]] = {
    "kai": ("cluster.scheduler=kai", "cluster.queue=infl", "cluster.priority_class=train"),
    "kueue": ("cluster.scheduler=kueue", "cluster.queue=research", "cluster.priority_class=batch"),
    "runai-namespace": (
        "cluster.scheduler=runai", "cluster.queue=vision", "cluster.namespace=runai-vision",
        "cluster.node_selector={topology.kubernetes.io/zone: a}",
    ),
    "object-store": (
        "cluster.storage=object_store", "cluster.object_store=s3://bucket/influence",
        "cluster.environment={AWS_REGION: eu-west-1, NCCL_IB_HCA: $(HOME)}",
        "cluster.extended_resources={rdma/ib: 1}",
    ),
    "ephemeral": ("cluster.storage=ephemeral", "cluster.ephemeral_storage=200Gi"),
}  # fmt: skip
CASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "-".join((preset, *overlays)): (preset, overlays, ()) for preset in PRESETS for overlays in OVERLAYS
}
CASES |= {f"smoke-{name}": ("smoke", (), sets) for name, sets in VARIANTS.items()}


def run_of(preset: str, overlays: tuple[str, ...] = (), *sets: str) -> RunSpec:
    """A run that is the same on every machine and day."""
    run = resolve_run(
        preset,
        overlays,
        sets,
        code=CodeVersion(version="0.1.0", git_commit="c" * 40, dirty=False, diff_sha256=None),
        today=date(2026, 2, 21),
    )
    provenance = {
        "user": "ada",
        "host": "desk",
        "created_at": "2026-02-21T09:30:00.123Z",
        "command": ["launcher"],
    }
    return replace(run, provenance=provenance)


def rendered(run: RunSpec) -> str:
    return render_template(TEMPLATE, job_values(run))


def job_of(preset: str, overlays: tuple[str, ...] = (), *sets: str) -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load(rendered(run_of(preset, overlays, *sets)))
    return job


def pod_of(job: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = job["spec"]["template"]["spec"]
    return pod


def container_of_template(template: dict[str, Any]) -> dict[str, Any]:
    """The one container of a pod template."""
    (container,) = template["spec"]["containers"]
    return dict(container)


def env_of_template(template: dict[str, Any]) -> dict[str, Any]:
    """A container's environment by name, each name once."""
    entries = container_of_template(template)["env"]
    assert len({entry["name"] for entry in entries}) == len(entries)
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    return container_of_template(job["spec"]["template"])


def env_of(job: dict[str, Any]) -> dict[str, Any]:
    return env_of_template(job["spec"]["template"])


def require_golden(path: Path, text: str, run: RunSpec) -> None:
    """The run document and its hash have tests of their own; the golden files leave them out."""
    text = text.replace(run.spec_hash, "sha256:...").replace(run.spec_hash[7:39], "...")
    text, count = re.subn(r'(INFL_RUN_JSON, value: )".*"}$', r'\1"..."}', text, flags=re.MULTILINE)
    assert count == 1, "one pod of a run has its document"
    if os.environ.get("INFL_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("case", CASES)
def test_the_job_is_the_golden_one(case: str) -> None:
    preset, overlays, sets = CASES[case]
    run = run_of(preset, overlays, *sets)
    # A name that was shortened ends in digits that depend on nothing but the names.
    require_golden(GOLDEN / f"{case}.yaml", rendered(run), run)


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(CASES)


NEWEST = kubernetes_validate.latest_version()


@pytest.mark.parametrize("version", ["1.31", NEWEST])
@pytest.mark.parametrize("case", CASES)
def test_the_job_passes_strict_validation(case: str, version: str) -> None:
    preset, overlays, own = CASES[case]
    everything = (
        "cluster.data_claim=infl-data", "cluster.image_pull_secrets=[a, b]",
        "wandb.entity=lab", "hardware.gpu_product=null",
        "cluster.tolerations=[{key: a, operator: Equal, value: b, effect: NoExecute, tolerationSeconds: 3}]",
    )  # fmt: skip
    for sets in ((), everything):
        kubernetes_validate.validate(job_of(preset, overlays, *own, *sets), version, strict=True)


def test_strict_validation_would_find_a_mistake() -> None:
    job = job_of("smoke")
    job["spec"]["backofLimit"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, NEWEST, strict=True)


def test_the_pod_failure_policy_does_what_the_exit_table_says() -> None:
    """The first rule that matches an exit code decides, and without one the failure is charged."""
    job = job_of("smoke")
    rules = job["spec"]["podFailurePolicy"]["rules"]
    assert rules[0] == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    container = container_of(job)["name"]
    verdicts = {"FailJob": Verdict.FATAL, "Ignore": Verdict.FREE_RETRY, None: Verdict.CHARGED_RETRY}
    for code in range(1, 256):
        matching = [
            rule["action"]
            for rule in rules[1:]
            if rule["onExitCodes"]["containerName"] == container
            and rule["onExitCodes"]["operator"] == "In"
            and code in rule["onExitCodes"]["values"]
        ]
        assert len(matching) <= 1
        assert verdicts[matching[0] if matching else None] is classify(code), code
    assert pod_of(job)["restartPolicy"] == "Never", "a pod failure policy needs it"
    assert job["spec"]["podReplacementPolicy"] == "Failed"


def test_the_jobs_limits_are_the_specs() -> None:
    job = job_of("smoke", (), "retry.backoff_limit=7", "retry.deadline_s=99", "retry.grace_period_s=5")
    assert (job["spec"]["backoffLimit"], job["spec"]["activeDeadlineSeconds"]) == (7, 99)
    assert pod_of(job)["terminationGracePeriodSeconds"] == 5
    assert (job["spec"]["parallelism"], job["spec"]["completions"]) == (1, 1)


def test_gpus_only_where_the_device_is_cuda() -> None:
    gpu, cpu = job_of("alltoken-timing"), job_of("alltoken-timing", ("tiny-cpu",))
    for kind in ("requests", "limits"):
        assert container_of(gpu)["resources"][kind] == {
            "nvidia.com/gpu": "8",
            "cpu": "96",
            "memory": "1500Gi",
        }
        assert set(container_of(cpu)["resources"][kind]) == {"cpu", "memory"}
    assert pod_of(gpu)["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H200"}
    assert pod_of(gpu)["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    assert not {"nodeSelector", "tolerations"} & set(pod_of(cpu))
    assert "nodeSelector" not in pod_of(job_of("smoke", (), "hardware.gpu_product=null"))
    assert "nvidia" not in json.dumps(
        {key: value for key, value in pod_of(cpu).items() if key != "containers"}
    )


def test_the_wandb_key_comes_by_reference_and_only_where_it_is_used() -> None:
    online, offline, disabled = (
        job_of("smoke", (), f"wandb.mode={mode}") for mode in ("online", "offline", "disabled")
    )
    reference = {"secretKeyRef": {"name": "infl-secrets", "key": "WANDB_API_KEY", "optional": True}}
    assert env_of(online)["WANDB_API_KEY"] == reference
    assert "WANDB_API_KEY" not in {**env_of(offline), **env_of(disabled)}
    for job in (online, offline):
        assert env_of(job)["WANDB_RUN_ID"] == job["metadata"]["name"] == "infl-smoke-0221"
        assert env_of(job)["WANDB_RESUME"] == "allow"
    assert not [name for name in env_of(disabled) if name.startswith("WANDB")]


def test_no_secret_of_the_environment_gets_into_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    text = rendered(resolve_run("smoke", sets=["wandb.entity=lab"]))
    assert "0123456789" * 4 not in text
    assert "hf_xxx" not in text


def test_the_trainer_gets_its_run_and_its_folder() -> None:
    run = run_of("smoke", (), "model.path=$(POD_UID)/$$x")
    job = yaml.safe_load(rendered(run))
    container = container_of(job)
    env = {name: value for name, value in env_of(job).items() if isinstance(value, str)}
    seen = {name: kubelet_expands(value, {**env, "POD_UID": "!", "x": "!"}) for name, value in env.items()}
    assert RunSpec.from_dict(json.loads(seen["INFL_RUN_JSON"])) == run
    assert [*container["command"], *container["args"]] == [
        "python", "-m", "influence.train", "--run-dir", "/artifacts/infl-smoke-0221",
    ]  # fmt: skip
    assert env_of(job)["POD_UID"] == {"fieldRef": {"fieldPath": "metadata.uid"}}
    assert env_of(job)["NODE_NAME"] == {"fieldRef": {"fieldPath": "spec.nodeName"}}


def test_every_path_that_is_written_lies_on_a_writable_volume() -> None:
    job = job_of("smoke")
    container, pod = container_of(job), pod_of(job)
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert len(mounts) == len(volumes)
    assert mounts["/artifacts"]["persistentVolumeClaim"] == {"claimName": "infl-artifacts"}
    assert mounts["/dev/shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "256Gi"}
    assert mounts["/tmp"]["emptyDir"] == {}
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        assert (env_of(job)[name] + "/").startswith("/tmp/")
    assert container["workingDir"] == "/tmp"


def test_data_is_mounted_read_only_where_there_is_a_claim() -> None:
    job = job_of("smoke", (), "cluster.data_claim=corpus")
    (mount,) = [m for m in container_of(job)["volumeMounts"] if m["mountPath"] == "/data"]
    (volume,) = [v for v in pod_of(job)["volumes"] if v["name"] == mount["name"]]
    assert mount["readOnly"] is True
    assert volume["persistentVolumeClaim"] == {"claimName": "corpus", "readOnly": True}
    assert unmet_needs(run_of("smoke", (), "cluster.data_claim=corpus")) == []
    (need,) = unmet_needs(run_of("smoke"))
    assert "/data/train.parquet" in need
    assert unmet_needs(run_of("smoke", ("tiny-cpu",))) == []


def test_labels_find_a_run_and_annotations_hold_the_whole_hash() -> None:
    run = run_of("smoke", (), "wandb.entity=lab")
    job = yaml.safe_load(rendered(run))
    for metadata in (job["metadata"], job["spec"]["template"]["metadata"]):
        assert metadata["labels"] == {"infl/run": run.run, "infl/spec-sha256": run.spec_hash[7:39]}
        assert metadata["annotations"] == {
            "infl/spec-hash": run.spec_hash,
            "infl/wandb-url": run.wandb["url"],
        }
        assert all(re.fullmatch(r"[a-z0-9][-a-z0-9]{0,62}", value) for value in metadata["labels"].values())


def test_the_pod_is_restricted() -> None:
    pod = pod_of(job_of("smoke"))
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostIPC", "hostNetwork", "hostPID"} & set(pod)


def shape(value: Any) -> Any:
    """The structure of a document without its texts."""
    if isinstance(value, dict):
        return {key: shape(below) for key, below in value.items()}
    return [shape(below) for below in value] if isinstance(value, list) else type(value).__name__


def with_texts(spec: dict[str, Any], text: str) -> dict[str, Any]:
    """Every free text of a spec replaced; what the template decides by keeps its value."""

    def replaced(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {key: replaced(below, (*path, key)) for key, below in value.items()}
        if isinstance(value, list):
            return [replaced(below, path) for below in value]
        decides = path in {
            ("hardware", "device"), ("wandb", "mode"), ("cluster", "storage"), ("cluster", "scheduler"),
        }  # fmt: skip
        return text if isinstance(value, str) and not decides else value

    result: dict[str, Any] = replaced(spec, ())
    return result


SETS = (
    "cluster.data_claim=d",
    "cluster.image_pull_secrets=[p]",
    "wandb.entity=e",
    "data.reward_function={path: a, name: b}",
)
BENIGN = run_of("smoke", (), *SETS)
BENIGN_SHAPE = shape(yaml.safe_load(rendered(BENIGN)))
QUEUED = run_of(
    "smoke", (), "cluster.scheduler=runai", "cluster.queue=q", "cluster.priority_class=p",
    "cluster.node_selector={zone: a}", "cluster.environment={NCCL_IB_HCA: a}",
    "cluster.extended_resources={rdma/ib: 1}", "cluster.storage=ephemeral", "cluster.ephemeral_storage=2Gi",
)  # fmt: skip
QUEUED_SHAPE = shape(yaml.safe_load(rendered(QUEUED)))


@settings(max_examples=40, deadline=None)
@given(ANY_TEXT.filter(bool))
def test_hostile_text_in_every_field_arrives_unchanged(text: str) -> None:
    run = RunSpec.new(
        text, with_texts(BENIGN.spec, text), provenance={"user": text}, wandb={**BENIGN.wandb, "url": text}
    )
    job = yaml.safe_load(rendered(run))
    assert shape(job) == BENIGN_SHAPE
    pod, container, env = pod_of(job), container_of(job), env_of(job)
    assert {
        "name": job["metadata"]["name"],
        "namespace": job["metadata"]["namespace"],
        "run label": job["metadata"]["labels"]["infl/run"],
        "url": job["metadata"]["annotations"]["infl/wandb-url"],
        "service account": pod["serviceAccountName"],
        "pull secret": pod["imagePullSecrets"][0]["name"],
        "product": pod["nodeSelector"]["nvidia.com/gpu.product"],
        "toleration": pod["tolerations"][0]["key"],
        "image": container["image"],
        "memory": container["resources"]["limits"]["memory"],
        "secret": env["WANDB_API_KEY"]["secretKeyRef"]["name"],
        "W&B id": kubelet_expands(env["WANDB_RUN_ID"], {"POD_UID": "!"}),
        "shared memory": pod["volumes"][1]["emptyDir"]["sizeLimit"],
        "claim": pod["volumes"][0]["persistentVolumeClaim"]["claimName"],
        "data claim": pod["volumes"][3]["persistentVolumeClaim"]["claimName"],
    } == dict.fromkeys(
        ["name", "namespace", "run label", "url", "service account", "pull secret", "product", "toleration",
         "image", "memory", "secret", "W&B id", "shared memory", "claim", "data claim"],
        text,
    )  # fmt: skip
    assert kubelet_expands(container["args"][1], {"POD_UID": "!"}) == f"/artifacts/{text}"
    assert json.loads(kubelet_expands(env["INFL_RUN_JSON"], {"POD_UID": "!"})) == run.to_dict()


def test_a_run_document_that_no_environment_variable_holds_is_refused() -> None:
    fits = run_of("smoke", (), f"verl.+trainer.note={'$' * 90_000}")
    assert len(env_of(yaml.safe_load(rendered(fits)))["INFL_RUN_JSON"]) > 2 * 90_000  # halved by Kubernetes
    with pytest.raises(SpecError, match="bytes, and 100000 is the most") as caught:
        job_values(run_of("smoke", (), f"verl.+trainer.note={'x' * 100_000}"))
    assert "128 KiB" in str(caught.value.why)


@settings(max_examples=40, deadline=None)
@given(ANY_TEXT.filter(bool))
def test_hostile_text_in_the_settings_of_a_site_arrives_unchanged(text: str) -> None:
    job = yaml.safe_load(rendered(replace(QUEUED, spec=with_texts(QUEUED.spec, text))))
    assert shape(job) == QUEUED_SHAPE
    pod = pod_of(job)
    assert {
        job["metadata"]["labels"]["runai/queue"],
        job["spec"]["template"]["metadata"]["labels"]["runai/queue"],
        pod["priorityClassName"], pod["nodeSelector"]["zone"], pod["volumes"][0]["emptyDir"]["sizeLimit"],
        kubelet_expands(env_of(job)["NCCL_IB_HCA"], {"POD_UID": "!"}),
    } == {text}  # fmt: skip


def test_kai_finds_its_queue_on_the_job_and_on_the_pod() -> None:
    job = job_of("smoke", (), *VARIANTS["kai"])
    pod_labels = job["spec"]["template"]["metadata"]["labels"]
    assert job["metadata"]["labels"]["kai.scheduler/queue"] == pod_labels["kai.scheduler/queue"] == "infl"
    assert pod_labels["kai.scheduler/preemptibility"] == "preemptible"
    assert pod_labels["priorityClassName"] == pod_of(job)["priorityClassName"] == "train"
    assert pod_of(job)["schedulerName"] == "kai-scheduler"
    assert "suspend" not in job["spec"]
    firm = job_of(
        "smoke", (), *VARIANTS["kai"], "cluster.preemptible=false", f"cluster.priority_class={'p' * 64}"
    )
    labels = firm["spec"]["template"]["metadata"]["labels"]
    assert labels["kai.scheduler/preemptibility"] == "non-preemptible"
    assert "priorityClassName" not in labels, "no label holds 64 characters"


def test_kueue_gets_a_suspended_job_with_its_queue() -> None:
    job = job_of("smoke", (), *VARIANTS["kueue"])
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert set(job["spec"]["template"]["metadata"]["labels"]) == {"infl/run", "infl/spec-sha256"}
    assert "schedulerName" not in pod_of(job)


def test_run_ai_schedules_an_ordinary_job_of_its_namespace() -> None:
    job = job_of("smoke", (), *VARIANTS["runai-namespace"])
    assert job["metadata"]["namespace"] == "runai-vision"
    assert job["metadata"]["labels"]["runai/queue"] == "vision"
    assert pod_of(job)["schedulerName"] == "runai-scheduler"
    assert pod_of(job)["nodeSelector"] == {
        "nvidia.com/gpu.product": "NVIDIA-H200", "topology.kubernetes.io/zone": "a",
    }  # fmt: skip


def test_an_object_stores_keys_come_by_reference_unless_they_are_given_openly() -> None:
    job = job_of("smoke", (), *VARIANTS["object-store"])
    env = env_of(job)
    assert env["INFL_STORE_URL"] == "s3://bucket/influence"
    assert env["AWS_REGION"] == "eu-west-1"
    assert env["NCCL_IB_HCA"] == "$$(HOME)"
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
        assert env[key] == {"secretKeyRef": {"name": "infl-secrets", "key": key, "optional": True}}
    assert pod_of(job)["volumes"][0] == {"name": "artifacts", "emptyDir": {}}
    for kind in ("requests", "limits"):
        assert container_of(job)["resources"][kind]["rdma/ib"] == "1"
    other = env_of(job_of("smoke", (), "cluster.storage=object_store", "cluster.object_store=gs://bucket/a"))
    assert not [name for name in other if name.startswith("AWS")]


def test_further_devices_replace_none_of_the_runs_own() -> None:
    job = job_of("smoke", (), "cluster.extended_resources={nvidia.com/gpu: 1, cpu: 1, rdma/ib: 2}")
    assert container_of(job)["resources"]["limits"] == {
        "nvidia.com/gpu": "8", "cpu": "96", "memory": "1500Gi", "rdma/ib": "2",
    }  # fmt: skip


def test_a_later_generation_differs_in_its_name_only() -> None:
    run = run_of("smoke")
    first = yaml.safe_load(rendered(run))
    second = yaml.safe_load(render_template(TEMPLATE, job_values(run, object_name=f"{run.run}-r2")))
    assert second["metadata"].pop("name") == f"{run.run}-r2"
    assert first["metadata"].pop("name") == run.run
    assert first == second


def test_the_trainer_knows_its_run_and_its_job() -> None:
    env = env_of(job_of("smoke"))
    assert env["INFL_RUN_ID"] == "infl-smoke-0221"
    assert env["JOB_UID"] == {
        "fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/controller-uid']"}
    }
