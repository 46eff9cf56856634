from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import influence
from influence.config import CHOICES, TracerConfig, TracerConfigError

REPOSITORY = Path(__file__).parents[2]


def base_section() -> dict[str, Any]:
    section: dict[str, Any] = yaml.safe_load((REPOSITORY / "jobs/base.yaml").read_text())["influence"]
    return section


def test_options_and_defaults_are_those_of_the_base_preset() -> None:
    assert TracerConfig().to_mapping() == base_section()
    assert TracerConfig.from_mapping(base_section()) == TracerConfig()


def test_mapping_round_trip_through_json() -> None:
    config = TracerConfig(hessian="identity", modules=("q_proj", "layers.1.*"), max_tokens_per_response=5)
    assert TracerConfig.from_mapping(json.loads(json.dumps(config.to_mapping()))) == config


def test_inverse_means_response() -> None:
    assert TracerConfig(hessian="inverse") == TracerConfig(hessian="response")


def test_unknown_option_names_the_nearest_and_all() -> None:
    with pytest.raises(TracerConfigError) as error:
        TracerConfig.from_mapping({"dampng": 0.1})
    assert "influence.dampng" in str(error.value)
    assert "did you mean 'damping'?" in str(error.value)
    assert all(name in str(error.value) for name in base_section())


@pytest.mark.parametrize("option", sorted(CHOICES))
def test_unknown_choice_names_the_option_and_lists_the_valid_ones(option: str) -> None:
    with pytest.raises(TracerConfigError) as error:
        TracerConfig.from_mapping({option: "no such thing"})
    assert f"influence.{option}" in str(error.value)
    assert all(choice in str(error.value) for choice in CHOICES[option])


def test_near_choice_is_named() -> None:
    with pytest.raises(TracerConfigError, match=r"did you mean 'response'.*inverse"):
        TracerConfig(hessian="responses")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("damping", 0.0),
        ("damping", -0.1),
        ("damping", float("nan")),
        ("damping", "0.1"),
        ("damping", True),
        ("damping", 10**400),
        ("accepted_above", float("inf")),
        ("accepted_above", -(10**400)),
        ("exclude_self", 1),
        ("profile_timing", "yes"),
        ("projection_dim_factor", 0),
        ("projection_dim_factor", 2.0),
        ("max_hessian_dim", 0),
        ("max_tokens_per_response", 0),
        ("max_tokens_per_response", -2),
        ("max_tokens_per_response", True),
        ("seed", -1),
        ("modules", []),
        ("modules", "q_proj"),
        ("modules", [3]),
        ("modules", None),
        ("modules", {"q_proj": 1}),
        ("hessian", None),
        ("hessian", ["response"]),
    ],
)
def test_impossible_values_are_refused(option: str, value: object) -> None:
    with pytest.raises(TracerConfigError, match=f"influence.{option}"):
        TracerConfig.from_mapping({option: value})


def test_the_sign_counts_twice_where_objective_and_contrast_both_carry_it() -> None:
    assert {
        (objective, contrast)
        for objective in CHOICES["objective"]
        for contrast in CHOICES["contrast"]
        if TracerConfig(objective=objective, contrast=contrast).counts_advantage_sign_twice
    } == {
        ("log_prob_advantage", "accepted_minus_rejected"),
        ("log_prob_advantage", "advantage"),
        ("training_loss", "accepted_minus_rejected"),
        ("training_loss", "advantage"),
    }


def test_the_reference_run_says_each_of_its_settings() -> None:
    # From the definition of the run, not from the class's defaults, which may change.
    assert {
        "objective": "log_prob_advantage",
        "contrast": "accepted_minus_rejected",
        "scope": "per_prompt",
        "hessian": "response",
        "damping": 0.1,
        "damping_mode": "trace_over_dim",
        "exclude_self": False,
        "positions": "response",
        "projection_dim_factor": 256,
        "max_tokens_per_response": -1,
    }.items() <= TracerConfig.reference_run().to_mapping().items()


def test_importing_the_package_and_its_config_loads_no_torch_and_no_numpy() -> None:
    code = (
        "import sys, influence, influence.config; influence.TracerConfig();"
        "print(sorted({'torch', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_public_names_load_and_others_do_not() -> None:
    assert set(influence.__all__) <= set(dir(influence))
    assert influence.InfluenceTracer.__name__ == "InfluenceTracer"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = influence.no_such_name


@pytest.mark.parametrize("options", [None, [], "damping", 3])
def test_options_must_be_a_mapping(options: Any) -> None:
    with pytest.raises(TracerConfigError, match="expected options with values"):
        TracerConfig.from_mapping(options)
