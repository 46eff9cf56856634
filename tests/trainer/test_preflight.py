"""Each problem is found before anything starts: one line, an exit code that says whether to retry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from influence.machine import Machine
from influence.rundir import ConflictError, FencedError, StorageError, TrainerExit
from influence.train import preflight as preflight_module
from influence.train.preflight import node_preflight, preflight
from influence.train.refusal import FAILED, Refusal, refusal_of
from influence.train.schema import require_valid_spec
from tests.trainer.conftest import Spec, resolve

LARGE = Machine(num_cpus=128, memory_bytes=2**41, shared_memory_bytes=2**39, num_gpus=8)


def refusal(spec: Spec, machine: Machine = LARGE) -> Refusal:
    with pytest.raises(Refusal) as caught:
        require_valid_spec(spec)
        preflight(spec, machine)
    assert "\n" not in caught.value.reason
    return caught.value


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages are those of a GPU image, whatever this machine has."""
    monkeypatch.setattr(preflight_module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(preflight_module.metadata, "version", lambda name: "0.9.1")
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)


@pytest.fixture
def gpu_spec(tmp_path: Path) -> Spec:
    data = tmp_path / "train.parquet"
    data.write_bytes(b"PAR1")
    return resolve("alltoken-timing", data__train_files=[str(data)], data__val_files=[str(data)])


def test_every_preset_passes_on_a_machine_that_is_large_enough(gpu_spec: Spec) -> None:
    files = {
        "data__train_files": gpu_spec["data"]["train_files"],
        "data__val_files": gpu_spec["data"]["val_files"],
    }
    for preset in ("alltoken-timing", "capped512-timing", "smoke"):
        for spec in (resolve(preset, **files), resolve(preset, "tiny-cpu"), resolve(preset, "tiny-gpu")):
            require_valid_spec(spec)
            preflight(spec, LARGE)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("training__total_stepz", 1, "did you mean 'total_steps'"),
        ("training__total_steps", "2", "wrong type"),
        ("training__use_kl_loss", 1, "wrong type"),
        ("training__seed", True, "wrong type"),
        ("hardware__device", "tpu", "valid: cuda, cpu"),
        ("influence__hessian", "respons", "did you mean 'response'"),
        ("influence__dampin", 1.0, "no such option"),
    ],
)
def test_names_and_values_that_do_not_exist(tiny_spec: Spec, path: str, value: Any, expected: str) -> None:
    section, key = path.split("__")
    tiny_spec[section][key] = value
    error = refusal(tiny_spec)
    assert error.code == TrainerExit.CONFIG
    assert expected in error.reason


def test_missing_keys_and_sections_are_named(tiny_spec: Spec) -> None:
    del tiny_spec["training"]["seed"]
    assert "training.seed is missing" in refusal(tiny_spec).reason
    del tiny_spec["training"]
    assert "'training' is missing" in refusal(tiny_spec).reason


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rollout__name": "vllm"}, "use hf_cpu"),
        ({"rollout__tensor_parallel_size": 2}, "1 with rollout.name hf_cpu"),
        ({"model__attn_implementation": "flash_attention_2"}, "use sdpa"),
        ({"model__dtype": "bfloat16"}, "use float32"),
        ({"hardware__nodes": 0}, "hardware.nodes is 0"),
        ({"training__keep_checkpoints": 1}, "at least 2"),
        ({"training__ppo_epochs": 0}, "at least 1"),
        ({"training__mini_batch_prompts": 3}, "does not divide"),
        ({"training__responses_per_prompt": 1, "hardware__ranks_per_node": 3}, "cannot share equally"),
        ({"training__micro_batch_size_per_rank": 5}, "does not divide the 32 responses"),
        ({"training__use_dynamic_batch": True, "training__max_tokens_per_rank": 63}, "does not hold"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], expected: str) -> None:
    error = refusal(resolve("alltoken-timing", "tiny-cpu", **changes))
    assert error.code == TrainerExit.CONFIG
    assert expected in error.reason


def test_files_that_are_not_there_are_data_errors(gpu_spec: Spec, tmp_path: Path) -> None:
    gpu_spec["data"]["val_files"] = [str(tmp_path / "absent.parquet")]
    error = refusal(gpu_spec)
    assert (error.code, "absent.parquet is not a file" in error.reason) == (TrainerExit.DATA, True)
    (tmp_path / "empty.parquet").touch()
    gpu_spec["data"]["val_files"] = [str(tmp_path / "empty.parquet")]
    assert "is empty" in refusal(gpu_spec).reason
    gpu_spec["data"]["val_files"] = []
    assert "data.val_files is empty" in refusal(gpu_spec).reason
    gpu_spec["data"]["val_files"] = ["hdfs://host/val.parquet"]  # verl's business
    preflight(gpu_spec, LARGE)
    gpu_spec["data"]["reward_function"] = {"path": "/no/reward.py", "name": "score"}
    assert "data.reward_function: /no/reward.py" in refusal(gpu_spec).reason
    gpu_spec["data"]["reward_function"] = None
    gpu_spec["model"]["path"] = "/no/model"
    assert "/no/model is not a directory" in refusal(gpu_spec).reason


@pytest.mark.parametrize(
    ("resource", "amount", "expected"),
    [
        ("num_gpus", 7, "8 GPUs and this machine has 7"),
        ("num_cpus", 95, "hardware.cpus is 96 and this machine gives 95"),
        ("memory_bytes", 2**40, "hardware.memory is 1500Gi and this machine gives 1024.0Gi"),
        ("shared_memory_bytes", 2**26, "hardware.shared_memory is 256Gi"),
    ],
)
def test_a_machine_that_is_too_small(gpu_spec: Spec, resource: str, amount: int, expected: str) -> None:
    sizes = {name: getattr(LARGE, name) for name in Machine.__slots__} | {resource: amount}
    error = refusal(gpu_spec, Machine(**sizes))
    assert (error.code, expected in error.reason) == (TrainerExit.CONFIG, True), error.reason


def test_on_several_nodes_the_drivers_machine_may_be_small(gpu_spec: Spec) -> None:
    """Each node speaks for itself later (`influence.train.node`)."""
    gpu_spec["hardware"]["nodes"] = 2
    small = Machine(num_cpus=1, memory_bytes=2**30, num_gpus=0)
    preflight(gpu_spec, small)
    with pytest.raises(Refusal, match=r"hardware\.cpus is 96"):
        node_preflight(gpu_spec, small)
    gpu_spec["rollout"]["tensor_parallel_size"] = 16
    assert "does not divide 8 ranks of a node" in refusal(gpu_spec).reason


def test_a_cpu_run_needs_neither_gpus_nor_shared_memory(tiny_spec: Spec) -> None:
    preflight(tiny_spec, Machine(num_cpus=2, memory_bytes=2**33, shared_memory_bytes=2**26, num_gpus=0))


def test_a_machine_that_reports_a_little_less_than_it_was_sold_with_will_do(tiny_spec: Spec) -> None:
    wanted_bytes = 6 * 2**30
    assert tiny_spec["hardware"]["memory"] == "6Gi"
    preflight(tiny_spec, Machine(num_cpus=2, memory_bytes=int(0.91 * wanted_bytes), num_gpus=0))
    assert (
        "hardware.memory"
        in refusal(tiny_spec, Machine(num_cpus=2, memory_bytes=int(0.89 * wanted_bytes), num_gpus=0)).reason
    )


def test_packages_that_are_missing_or_of_another_version(
    tiny_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight_module.metadata, "version", lambda name: "0.8.0")
    assert "verl 0.8.0 is installed" in refusal(tiny_spec).reason
    monkeypatch.setattr(
        preflight_module.importlib.util, "find_spec", lambda name: None if name in ("ray", "uvicorn") else 1
    )
    error = refusal(tiny_spec)
    assert "ray, uvicorn" in error.reason
    assert "influence-launcher[trainer]" in error.reason


def test_online_wandb_needs_a_key(gpu_spec: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    error = refusal(gpu_spec)
    assert (error.code, "api.wandb.ai" in error.reason) == (TrainerExit.CONFIG, True)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password hidden\n")
    preflight(gpu_spec, LARGE)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert "wandb.example.org" in refusal(gpu_spec).reason
    gpu_spec["wandb"]["mode"] = "offline"
    preflight(gpu_spec, LARGE)


def test_run_directory_errors_keep_their_meaning() -> None:
    assert refusal_of(FencedError("a", 1, 2)).code == TrainerExit.RETRY
    assert refusal_of(StorageError.from_os_error(OSError(28, "full"), "x", "writing")).code == FAILED
    conflict = refusal_of(ConflictError("run.json", [f"a.b{n}: 1 -> 2" for n in range(5)]))
    assert conflict.code == TrainerExit.CONFIG
    assert "a.b4: 1 -> 2" in conflict.reason  # all of the difference, a line each
