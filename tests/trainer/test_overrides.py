"""A spec in verl's words; that verl's own configuration has those words is checked against the real one."""

from __future__ import annotations

from typing import Any

import pytest

from influence.owned_settings import OWNED_BY_THE_RUN
from influence.rundir import RunPaths
from influence.verl_engine.environment import bytecode_environment, worker_environment
from influence.verl_engine.overrides import Inputs, verl_overrides
from tests.trainer.conftest import Spec, resolve, run_document

PATHS = RunPaths.of("/runs", "infl-test-0001")
INPUTS = Inputs(
    model_path="/cache/tiny", train_files=("/cache/train.parquet",), val_files=("/cache/val.parquet",),
    reward_path="/lib/reward.py",
)  # fmt: skip


def overrides(spec: Spec, *, with_wandb: bool = True, num_cpus: int = 2) -> dict[str, Any]:
    return verl_overrides(spec, PATHS, INPUTS, {"A": "b"}, with_wandb=with_wandb, num_cpus=num_cpus)


def test_the_run_directory_gets_what_retries_need(tiny_spec: Spec) -> None:
    got = overrides(tiny_spec)
    assert got["trainer.default_local_dir"] == "/runs/infl-test-0001/checkpoints"
    assert got["trainer.resume_mode"] == "auto"
    assert (got["trainer.save_freq"], got["trainer.max_actor_ckpt_to_keep"]) == (1, 2)
    assert got["trainer.total_training_steps"] == 2
    assert got["trainer.experiment_name"] == "infl-test-0001"


def test_save_freq_0_is_verls_never() -> None:
    spec = resolve("alltoken-timing", "tiny-cpu", training__save_freq=0)
    assert overrides(spec)["trainer.save_freq"] == -1


def test_sizes_and_seeds_reach_every_place_that_has_them() -> None:
    spec = resolve(
        "alltoken-timing", "tiny-cpu", training__seed=7, training__micro_batch_size_per_rank=4,
        training__clip_ratio=0.3,
    )  # fmt: skip
    got = overrides(spec)
    assert [value for key, value in got.items() if key.endswith("seed")] == [7] * 4
    assert [value for key, value in got.items() if "micro_batch_size_per_gpu" in key] == [4] * 3
    assert [value for key, value in got.items() if ".clip_ratio" in key] == [0.3] * 3
    assert got["data.train_batch_size"] == got["actor_rollout_ref.actor.ppo_mini_batch_size"] == 8
    assert got["actor_rollout_ref.rollout.n"] == 8


def test_ray_is_given_more_cpus_than_its_actors_ask_for() -> None:
    small = overrides(resolve("alltoken-timing", "tiny-cpu"), num_cpus=2)
    assert small["ray_kwargs.ray_init.num_cpus"] >= 2 * 3 + 2 + 1
    few_cores = overrides(resolve("alltoken-timing"), num_cpus=16)
    assert few_cores["ray_kwargs.ray_init.num_cpus"] >= 8 * 3 + 9 + 1
    large = overrides(resolve("alltoken-timing"), num_cpus=96)
    assert large["ray_kwargs.ray_init.num_cpus"] == 96
    assert "+ray_kwargs.ray_init.num_gpus" not in large
    assert small["+ray_kwargs.ray_init.num_gpus"] == 2


def test_a_cluster_that_is_joined_has_its_resources_already(tiny_spec: Spec) -> None:
    got = verl_overrides(
        tiny_spec, PATHS, INPUTS, {"A": "b"}, with_wandb=False, num_cpus=2, ray_address="10.0.0.1:6379"
    )
    of_ray = {key.rpartition("ray_init.")[2]: value for key, value in got.items() if "ray_init" in key}
    assert of_ray == {"address": "10.0.0.1:6379", "runtime_env.env_vars": {"A": "b"}}


def test_loggers_follow_wandb(tiny_spec: Spec) -> None:
    assert overrides(tiny_spec)["trainer.logger"] == ["console", "file", "wandb"]
    assert overrides(tiny_spec, with_wandb=False)["trainer.logger"] == ["console", "file"]


def test_the_presets_own_settings_come_last(tiny_spec: Spec) -> None:
    tiny_spec["verl"] = {"trainer.save_freq": 5, "actor_rollout_ref.actor.optim.lr_warmup_steps": 3}
    got = overrides(tiny_spec)
    assert got["trainer.save_freq"] == 5
    assert list(got)[-1] == "actor_rollout_ref.actor.optim.lr_warmup_steps"


def test_wandb_gets_one_run_for_all_attempts_and_no_secret(
    tiny_spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    run = run_document("infl-test-0001", tiny_spec)
    first, second = (worker_environment(run, PATHS, attempt) for attempt in (1, 2))
    assert first["WANDB_RUN_ID"] == second["WANDB_RUN_ID"] == "infl-test-0001"
    assert (first["WANDB_RESUME"], first["WANDB_MODE"]) == ("allow", "offline")
    assert first["WANDB_DIR"] == "/runs/infl-test-0001"
    assert first["VERL_FILE_LOGGER_PATH"].endswith("metrics/attempt-0001.jsonl")
    assert "secret" not in str(first)


def test_only_a_cpu_run_loads_the_cpu_platform(tiny_spec: Spec) -> None:
    on_cpu = worker_environment(run_document("infl-test-0001", tiny_spec), PATHS, 1)
    assert on_cpu["VERL_PLATFORM"] == "cpu"
    assert on_cpu["OMP_NUM_THREADS"] == "1"
    on_gpu = worker_environment(run_document("infl-test-0001", resolve("alltoken-timing")), PATHS, 1)
    assert not {name for name in on_gpu if name.startswith(("VERL_P", "OMP"))}


def test_a_gpu_trains_on_what_the_cpu_generates() -> None:
    spec = resolve("smoke", "tiny-gpu")
    got = overrides(spec, num_cpus=4)
    assert (got["trainer.device"], got["actor_rollout_ref.rollout.name"]) == ("cuda", "hf_cpu")
    assert got["actor_rollout_ref.rollout.tensor_model_parallel_size"] == 1
    assert got["actor_rollout_ref.rollout.agent.default_agent_loop"] == "seeded_single_turn_agent"
    # Ray counts the machine's GPUs itself, and verl computes in its own bfloat16.
    assert not {key for key in got if "num_gpus" in key or "mixed_precision" in key}
    environment = worker_environment(run_document("infl-test-0001", spec), PATHS, 1)
    assert environment["OMP_NUM_THREADS"] == "4"
    assert "VERL_PLATFORM" not in environment


def test_bytecode_is_shared_only_where_it_would_be_written_nowhere() -> None:
    from pathlib import Path

    assert bytecode_environment({}, Path("/cache")) == {}
    assert (
        bytecode_environment({"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": "/x"}, Path("/c")) == {}
    )
    shared = bytecode_environment({"PYTHONDONTWRITEBYTECODE": "1"}, Path("/cache"))
    assert shared == {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": "/cache/pycache"}


@pytest.mark.slow
class TestAgainstVerl:
    """With verl's own configuration, composed by Hydra."""

    def config(self, spec: Spec) -> Any:
        from influence.verl_engine.compose import compose_config, require_supported

        config = compose_config(overrides(spec))
        require_supported(config)
        return config

    @pytest.mark.parametrize("preset", ["alltoken-timing", "capped512-timing", "smoke"])
    @pytest.mark.parametrize("overlay", [(), ("tiny-cpu",), ("tiny-gpu",)])
    def test_verl_has_every_setting_and_holds_every_value(
        self, preset: str, overlay: tuple[str, ...]
    ) -> None:
        from omegaconf import OmegaConf

        spec = resolve(preset, *overlay)
        config = self.config(spec)
        for key, value in overrides(spec).items():
            found = OmegaConf.select(config, key.removeprefix("+"))
            if OmegaConf.is_config(found):
                found = OmegaConf.to_container(found)
            assert found == value, key

    def test_what_follows_in_verls_configuration(self, tiny_spec: Spec) -> None:
        tiny_spec["training"]["use_dynamic_batch"] = True
        config = self.config(tiny_spec)
        # verl derives these from others; the engine's capture depends on them.
        assert config.actor_rollout_ref.rollout.log_prob_use_dynamic_bsz is True
        assert config.actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu == 1024
        assert config.actor_rollout_ref.rollout.response_length == 32
        assert config.actor_rollout_ref.ref.strategy == "fsdp2"

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({"actor_rollout_ref.actor.optim.lr_warmup_stepz": 1}, "did you mean 'lr_warmup_steps'"),
            ({"no.such.section": 1}, "verl.no.such.section"),
            ({"actor_rollout_ref.actor.strategy": "megatron"}, "use fsdp2 or fsdp"),
            ({"actor_rollout_ref.actor.strategy": "fsdp"}, "use fsdp2 on a CPU"),
            ({"actor_rollout_ref.actor.ulysses_sequence_parallel_size": 2}, "Ulysses"),
            (
                {"actor_rollout_ref": {"actor": {"fsdp_config": {"ulysses_sequence_parallel_size": 2}}}},
                "Ulysses",
            ),
            ({"actor_rollout_ref.model.use_fused_kernels": True}, "fused kernels"),
        ],
    )
    def test_settings_that_verl_or_the_tracer_do_not_have(
        self, tiny_spec: Spec, settings: dict[str, Any], expected: str
    ) -> None:
        from influence.verl_engine.compose import ConfigurationError

        tiny_spec["verl"] = settings
        with pytest.raises(ConfigurationError, match=expected):
            self.config(tiny_spec)

    def test_a_new_setting_needs_a_plus(self, tiny_spec: Spec) -> None:
        tiny_spec["verl"] = {"+actor_rollout_ref.model.override_config.rope_theta": 5.0}
        config = self.config(tiny_spec)
        assert config.actor_rollout_ref.model.override_config.rope_theta == 5.0

    @pytest.mark.parametrize("key", [*OWNED_BY_THE_RUN, "hydra.run.dir"])
    def test_what_belongs_to_the_run_cannot_be_set(self, key: str) -> None:
        from influence.verl_engine.compose import ConfigurationError, require_unowned

        section, rest = key.split(".", 1)
        for settings in ({key: 1}, {f"+{key}": 1}, {section: {rest: 1}}):
            with pytest.raises(ConfigurationError, match="belongs to the run"):
                require_unowned(settings)

    def test_mixtures_of_experts_are_refused(self) -> None:
        from transformers import Qwen2Config, Qwen2MoeConfig

        from influence.verl_engine.compose import ConfigurationError, require_dense

        require_dense(Qwen2Config())
        with pytest.raises(ConfigurationError, match="mixture of experts"):
            require_dense(Qwen2MoeConfig())
