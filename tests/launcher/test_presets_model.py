"""The schema: every setting is checked, in the preset's words, and the tracer takes what the schema takes."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influence.config import ALIASES, CHOICES, TracerConfig, TracerConfigError
from influence.machine import parse_bytes
from influence.owned_settings import OWNED_BY_THE_RUN
from launcher.model import setting_names, validate
from launcher.model.sections import Influence, Settings
from launcher.presets import PresetLibrary
from launcher.resources import shipped_jobs_dir
from launcher.yaml_source import KeyPath, dotted, read_yaml

TINY = PresetLibrary().resolve("smoke", ["tiny-cpu"]).settings
GPU = PresetLibrary().resolve("alltoken-timing").settings


def problems(base: dict[str, Any], **changes: Any) -> dict[str, str]:
    """The problems by dotted path after setting ``section__key`` to a value."""
    data = copy.deepcopy(base)
    for path, value in changes.items():
        section, _, key = path.partition("__")
        data[section][key] = value
    return {dotted(p.path): p.what for p in validate(data)[1]}


ONE_A_STEP = copy.deepcopy(TINY)
ONE_A_STEP["hardware"] |= {"ranks_per_node": 1}
ONE_A_STEP["training"] |= {
    **dict.fromkeys(("prompts_per_step", "mini_batch_prompts", "responses_per_prompt"), 1),
    "use_dynamic_batch": False,
    "micro_batch_size_per_rank": 1,
}
ONE_A_STEP["influence"] |= {"scope": "batch", "contrast": "none", "exclude_self": False}


def leaves(data: Any, path: KeyPath = ()) -> list[tuple[KeyPath, Any]]:
    if isinstance(data, dict) and data:
        return [leaf for key, value in data.items() for leaf in leaves(value, (*path, key))]
    return [(path, data)]


def replaced(data: dict[str, Any], path: KeyPath, value: Any) -> dict[str, Any]:
    result = copy.deepcopy(data)
    section: Any = result
    for part in path[:-1]:
        section = section[part]
    section[path[-1]] = value
    return result


LISTS_OF_TEXT = {
    *("data.train_files", "data.val_files", "influence.modules"),
    *("cluster.image_pull_secrets", "cluster.node_pools"),
}
ALL_SETTINGS = [path for path, _ in leaves(GPU)]


def test_the_schema_has_no_defaults_and_base_is_complete() -> None:
    document = read_yaml(shipped_jobs_dir() / "base.yaml").data
    del document["description"]
    assert sorted(document) == sorted(Settings.model_fields)
    for name, section in document.items():
        if name != "verl":
            assert list(section) == setting_names((name,)), name
            assert all(
                field.is_required() for field in Settings.model_fields[name].annotation.model_fields.values()
            )  # type: ignore[union-attr]


@pytest.mark.parametrize("path", ALL_SETTINGS, ids=dotted)
def test_each_setting_is_required(path: KeyPath) -> None:
    data = copy.deepcopy(GPU)
    section: Any = data
    for part in path[:-1]:
        section = section[part]
    del section[path[-1]]
    assert [(p.path, p.what) for p in validate(data)[1]] == [(path, "missing")]


@pytest.mark.parametrize("path", ALL_SETTINGS, ids=dotted)
def test_each_setting_refuses_a_value_of_a_wrong_type(path: KeyPath) -> None:
    for wrong in (["x"], {"x": 1}, object()):
        if isinstance(wrong, list) and dotted(path) in LISTS_OF_TEXT:
            continue
        if dotted(path) in ("verl", "cluster.extended_resources") and isinstance(wrong, dict):
            continue
        found = validate(replaced(GPU, path, wrong))[1]
        assert found, wrong
        assert found[0].path[: len(path)] == path


@pytest.mark.parametrize(
    ("path", "wrong", "what"),
    [
        (("training", "total_steps"), "3", "must be a whole number, not the text '3'"),
        (("training", "total_steps"), 3.0, "must be a whole number, not 3.0"),
        (("training", "total_steps"), True, "must be a whole number, not true"),
        (("training", "total_steps"), 0, "must be at least 1, not 0"),
        (("training", "learning_rate"), "1e-6 ", "must be a number, not the text '1e-6 '"),
        (("training", "learning_rate"), float("nan"), "must be a finite number, not nan"),
        (("rollout", "gpu_memory_utilization"), 1.5, "must be at most 1"),
        (("training", "use_kl_loss"), 1, "must be true or false, not 1"),
        (("training", "use_kl_loss"), "no", "must be true or false, not the text 'no'"),
        (("model", "path"), None, "must be text, not null"),
        (("model", "path"), "", "must not be empty"),
        (("model", "path"), "a\0b", "must not contain a NUL character"),
        (("model", "path"), "a\ud800", "must not contain half of a surrogate pair"),
        (("model", "dtype"), "bf16", "must be bfloat16 or float32, not the text 'bf16'"),
        (("influence", "hessian"), "respons", "; did you mean response?"),
        (("cluster", "namespace"), "Default", "must be lower-case letters, digits and '-', at most 63"),
        (("cluster", "namespace"), "a" * 64, "at most 63"),
        (("cluster", "image"), "a b", "must be an image reference"),
        (("cluster", "image"), "x\n", "must be an image reference"),
        (("cluster", "image"), "registry.example.com/x@sha256:...", "must be an image reference"),
        (("cluster", "image"), "registry.example.com/Team/x:1", "names have no capitals"),
        (("hardware", "memory"), "8 Gi", "must be a number of bytes with a unit"),
        (("hardware", "gpu_product"), "H200!", "must be a Kubernetes label value"),
        (("retry", "backoff_limit"), 2**31, "must be at most 2147483647"),
        (
            ("store", "columns"),
            ["tokens"],
            "must be token_ids or log_probs or advantages, not the text 'tokens'",
        ),
        (("verl",), {"a b": 1}, "must be a path of verl's configuration"),
        (("verl",), {"++trainer.x": 1}, "must be a path of verl's configuration"),
        (("verl",), {"trainer.": 1}, "must be a path of verl's configuration"),
        (("verl",), {"trainer": {"x": 1}}, "must be no mapping: write the path as one key, trainer.<...>"),
        (("verl",), {"a": float("inf")}, "must be text, a number"),
    ],
)
def test_a_wrong_value_is_told_in_words(path: KeyPath, wrong: Any, what: str) -> None:
    (found,) = validate(replaced(GPU, path, wrong))[1]
    assert what in found.what


def test_unknown_settings_name_the_nearest_at_every_depth() -> None:
    data = replaced(replaced(GPU, ("training", "total_stps"), 1), ("trainning",), {})
    data["cluster"]["tolerations"][0]["efect"] = "NoExecute"
    data["data"]["reward_function"] = {"path": "x", "nam": "y"}
    found = {dotted(p.path): p.what for p in validate(data)[1]}
    assert found["training.total_stps"] == "no such setting; did you mean total_steps?"
    assert found["trainning"] == "no such setting; did you mean training?"
    assert found["cluster.tolerations[0].efect"] == "no such setting; did you mean effect?"
    assert found["data.reward_function.nam"] == "no such setting; did you mean name?"
    assert found["data.reward_function.name"] == "missing"


def test_numbers_take_the_schemas_type_so_that_equal_settings_hash_equally() -> None:
    settings_, found = validate(replaced(GPU, ("influence", "damping"), 1))
    assert not found
    assert type(settings_["influence"]["damping"]) is float


def test_a_toleration_keeps_only_the_keys_that_were_written() -> None:
    assert validate(GPU)[0]["cluster"]["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]


@pytest.mark.parametrize(
    ("base", "changes", "path", "what"),
    [
        (
            GPU,
            {"training__mini_batch_prompts": 32},
            "training.mini_batch_prompts",
            "must divide training.prompts_per_step",
        ),
        (
            GPU,
            {"training__mini_batch_prompts": 96},
            "training.mini_batch_prompts",
            "must divide training.prompts_per_step",
        ),
        (
            GPU,
            {"hardware__ranks_per_node": 7},
            "training.mini_batch_prompts",
            "768, must split evenly over 7 ranks",
        ),
        (
            GPU,
            {"training__micro_batch_size_per_rank": 5},
            "training.micro_batch_size_per_rank",
            "must divide the 96 responses",
        ),
        (
            GPU,
            {"training__use_dynamic_batch": True, "training__max_tokens_per_rank": 9215},
            "training.max_tokens_per_rank",
            "9216 tokens",
        ),
        (
            GPU,
            {
                "training__responses_per_prompt": 1,
                "influence__contrast": "none",
                "influence__exclude_self": True,
            },
            "training.responses_per_prompt",
            "with influence.exclude_self nothing is left",
        ),
        (
            ONE_A_STEP,
            {"influence__contrast": "none", "influence__exclude_self": True},
            "training.responses_per_prompt",
            "(or training.prompts_per_step): with influence.exclude_self nothing is left",
        ),
        (
            ONE_A_STEP,
            {"influence__contrast": "accepted_minus_rejected"},
            "training.responses_per_prompt",
            "(or training.prompts_per_step): one response has no contrast",
        ),
        (
            GPU,
            {"influence__capture": "fused", "training__entropy_coeff": 0.01},
            "influence.capture",
            "cannot be fused with an entropy or KL term",
        ),
        (
            GPU,
            {"influence__capture": "fused", "training__use_kl_loss": True},
            "influence.capture",
            "cannot be fused with an entropy or KL term",
        ),
        (
            GPU,
            {"influence__capture": "fused", "training__mini_batch_prompts": 24},
            "influence.capture",
            "cannot be fused with several updates a step",
        ),
        (GPU, {"training__keep_checkpoints": 1}, "training.keep_checkpoints", "at least 2"),
        (
            GPU,
            {"rollout__tensor_parallel_size": 3},
            "rollout.tensor_parallel_size",
            "must divide the 8 ranks",
        ),
        (
            GPU,
            {"rollout__tensor_parallel_size": 16, "hardware__nodes": 2},
            "rollout.tensor_parallel_size",
            "must divide the 8 ranks of a node",
        ),
        (
            GPU,
            {"cluster__storage": "ephemeral", "hardware__nodes": 2},
            "cluster.storage",
            "must be claim, since hardware.nodes is 2",
        ),
        (
            GPU,
            {"rollout__name": "hf_cpu", "rollout__tensor_parallel_size": 2},
            "rollout.tensor_parallel_size",
            "must be 1, since rollout.name is hf_cpu",
        ),
        (GPU, {"model__dtype": "float32"}, "model.dtype", "must be bfloat16"),
        (GPU, {"data__train_files": []}, "data.train_files", "must name a file"),
        (GPU, {"data__source": "arithmetic"}, "data.train_files", "must be []"),
        (
            GPU,
            {"influence__max_tokens_per_response": 0},
            "influence.max_tokens_per_response",
            "must be -1 (all) or at least 1",
        ),
        (GPU, {"influence__modules": ["q_proj", "q_proj"]}, "influence.modules", "names q_proj 2 times"),
        (TINY, {"rollout__name": "vllm"}, "rollout.name", "must be hf_cpu"),
        (
            TINY,
            {"model__attn_implementation": "flash_attention_2"},
            "model.attn_implementation",
            "must be sdpa or eager",
        ),
        (TINY, {"model__dtype": "bfloat16"}, "model.dtype", "must be float32"),
    ],
)
def test_settings_that_do_not_fit_together(
    base: dict[str, Any], changes: dict[str, Any], path: str, what: str
) -> None:
    found = problems(base, **changes)
    assert what in found[path]


def test_what_a_rule_asks_for_satisfies_it() -> None:
    assert not problems(GPU, training__use_dynamic_batch=True, training__max_tokens_per_rank=9216)
    assert not problems(GPU, training__micro_batch_size_per_rank=6)
    assert not problems(GPU, training__save_freq=0, training__keep_checkpoints=1)
    assert not problems(GPU, influence__max_tokens_per_response=1)
    assert not problems(GPU, hardware__gpu_product=None)
    assert not problems(ONE_A_STEP)
    two = {"influence__exclude_self": True, "influence__contrast": "accepted_minus_rejected"}
    assert not problems(ONE_A_STEP, **two, training__responses_per_prompt=2)
    assert not problems(ONE_A_STEP, **two, training__prompts_per_step=2)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.integers(1, 12),
    mini=st.integers(1, 12),
    responses=st.integers(2, 6),
    ranks=st.integers(1, 6),
    micro=st.integers(1, 6),
)
def test_accepted_batches_split_evenly_as_verl_asserts(
    prompts: int, mini: int, responses: int, ranks: int, micro: int
) -> None:
    """verl's own assertions, worded anew: every rank gets whole micro-batches of every mini-batch."""
    fits = prompts % mini == 0 and mini * responses % ranks == 0 and (mini * responses // ranks) % micro == 0
    found = problems(
        GPU,
        training__prompts_per_step=prompts,
        training__mini_batch_prompts=mini,
        training__responses_per_prompt=responses,
        hardware__ranks_per_node=ranks,
        training__micro_batch_size_per_rank=micro,
    )
    assert (not found) == fits


@pytest.mark.parametrize(
    "changes",
    [
        {"influence__capture": "fused"},
        {"influence__capture": "auto", "training__entropy_coeff": 0.01, "training__mini_batch_prompts": 24},
        {
            "influence__capture": "fused",
            "influence__objective": "training_loss",
            "training__use_kl_loss": True,
            "training__mini_batch_prompts": 24,
        },
    ],
)
def test_fused_capture_is_refused_only_where_it_is_never_exact(changes: dict[str, Any]) -> None:
    assert not problems(GPU, **changes)


def test_the_tracers_options_are_those_of_the_schema() -> None:
    assert set(Influence.model_fields) == set(TracerConfig.__dataclass_fields__)
    for name, choices in CHOICES.items():
        aliases = {alias for option, alias in ALIASES if option == name}
        assert set(get_args(Influence.model_fields[name].annotation)) == {*choices, *aliases}, name


def test_the_tracers_defaults_are_those_of_base() -> None:
    base = read_yaml(shipped_jobs_dir() / "base.yaml").data["influence"]
    assert TracerConfig().to_mapping() == base
    assert TracerConfig.from_mapping(base) == TracerConfig()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_tracer_accepts_exactly_what_the_schema_accepts(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(Influence.model_fields)))
    candidates = [
        *CHOICES.get(name, ()),
        "inverse",
        "none",
        "x",
        -1,
        0,
        1,
        2,
        0.0,
        0.1,
        -0.5,
        float("inf"),
        True,
        None,
        [],
        ["a*"],
    ]
    value = data.draw(st.sampled_from(candidates))
    section = {**GPU["influence"], name: value}
    accepted = not validate({**GPU, "influence": section})[1]
    try:
        TracerConfig.from_mapping(section)
        taken = True
    except TracerConfigError:
        taken = False
    assert accepted == taken, (name, value)


@pytest.mark.parametrize("setting", ["memory", "shared_memory"])
def test_a_size_has_a_number_of_digits_that_can_be_computed_with(setting: str) -> None:
    data = copy.deepcopy(GPU)
    data["hardware"][setting] = "9" * 18 + "Pi"
    assert validate(data)[1] == []
    assert parse_bytes(data["hardware"][setting]) > 0
    data["hardware"][setting] = "9" * 400 + "Pi"
    assert "a number of bytes" in validate(data)[1][0].what


@pytest.mark.parametrize("key", [*OWNED_BY_THE_RUN, "hydra.run.dir"])
@pytest.mark.parametrize("plus", ["", "+"])
def test_what_belongs_to_the_run_is_refused_before_the_start(key: str, plus: str) -> None:
    data = copy.deepcopy(TINY)
    data["verl"] = {plus + key: 1}
    [problem] = validate(data)[1]
    assert problem.path == ("verl", plus + key)
    assert "belongs to the run" in problem.what


@pytest.mark.parametrize("setting", ["entity", "project"])
def test_names_in_wandb(setting: str) -> None:
    for name in ("a", "My project 2", "équipe_é.x-y", "n" * 128):
        assert problems(TINY, **{f"wandb__{setting}": name}) == {}
    for name in ("", "a/b", "a\nb", "a\x7f", "a?b", "n" * 129):
        assert "a name in W&B" in problems(TINY, **{f"wandb__{setting}": name})[f"wandb.{setting}"]


def test_a_tolerations_key_is_a_label_key() -> None:
    for key in ("nvidia.com/gpu", "gpu", "a" * 63, "x.y/" + "A_b.c-9", "a" * 253 + "/b"):
        assert problems(GPU, cluster__tolerations=[{"key": key}]) == {}
    for key in ("", "/gpu", "a/", "a/b/c", "a b", "-a", "a_b/c", "a" * 64, "a" * 254 + "/b", "a\n"):
        [what] = problems(GPU, cluster__tolerations=[{"key": key}]).values()
        assert "a Kubernetes label key" in what
