"""What counts as a secret, and that none gets into a spec."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.errors import SpecError
from launcher.presets import PresetLibrary
from launcher.secrets import is_secret_key, is_secret_value, redacted
from launcher.spec import resolve_run

SECRETS = [
    "0123456789abcdef" * 2 + "01234567",
    "wandb_v1_" + "Ab3" * 20,
    "hf_" + "aB1" * 11,
    "ghp_" + "aB1" * 12,
    "github_pat_" + "aB1_" * 8,
    "sk-proj-" + "aB1" * 12,
    "AKIA" + "ABCD1234" * 2,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0xxxx.c2lnbmF0dXJl",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
    "https://user:hunter2@example.com/x",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_well_known_forms_of_secrets_are_recognised(secret: str) -> None:
    assert is_secret_value(secret)
    assert is_secret_value(f" {secret}\n")
    assert secret not in redacted(f"--set=model.path={secret}")


@pytest.mark.parametrize(
    "text",
    [
        "Qwen/Qwen2.5-1.5B-Instruct",
        "registry.example.com/infl@sha256:" + "0a" * 32,
        "registry.example.com:5000/infl:0123456789abcdef0123456789abcdef01234567",
        "/data/sk-train.parquet",
        "infl-secrets",
        "https://example.com:8443/models/x@main",
        "token-influence",
        "",
    ],
)
def test_ordinary_settings_are_not(text: str) -> None:
    assert not is_secret_value(text)
    assert redacted(text) == text


def test_keys_that_name_secrets() -> None:
    for key in (
        "ray_kwargs.ray_init.runtime_env.env_vars.WANDB_API_KEY",
        "a.HF_TOKEN",
        "a.token",
        "db.password",
        "aws_secret_access_key",
        "x.api-key",
    ):
        assert is_secret_key(key), key
    for key in (
        "data.prompt_key",
        "actor.ppo_max_token_len_per_gpu",
        "model.pad_token",
        "data.max_tokens",
        "a.tokenizer",
    ):
        assert not is_secret_key(key), key


@pytest.mark.parametrize(
    "path", ["model.path", "wandb.project", "verl.trainer.project_name", "cluster.image"]
)
@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_value_is_refused_without_being_shown(path: str, secret: str) -> None:
    with pytest.raises(SpecError) as caught:
        PresetLibrary().resolve("smoke", sets=[f"{path}={json.dumps(secret)}"])
    assert caught.value.what.startswith(f"--set {path}: looks like a secret")
    assert secret not in json.dumps(caught.value.as_dict())


def test_a_secret_key_of_verl_is_refused_in_a_flag_and_in_a_file(tmp_path: Path) -> None:
    key = "ray_kwargs.ray_init.runtime_env.env_vars.WANDB_API_KEY"
    with pytest.raises(SpecError, match=f"^--set verl.{key}: looks like a secret"):
        PresetLibrary().resolve("smoke", sets=[f"verl.{key}=short"])
    preset = tmp_path / "mine.yaml"
    preset.write_text(f"extends: smoke\nverl:\n  {key}: short\n")
    with pytest.raises(SpecError) as caught:
        PresetLibrary().resolve(str(preset))
    assert caught.value.what.startswith(f"{preset}:3: verl.{key}: looks like a secret")
    assert "short" not in caught.value.what


def test_the_recorded_command_line_holds_no_secret() -> None:
    run = resolve_run(
        "smoke",
        command=[
            "render",
            "--preset",
            "smoke",
            "--note",
            SECRETS[0],
            f"--x=WANDB_API_KEY={SECRETS[1]}",
            "p.password=hunter2",
        ],
    )
    document = json.dumps(run.to_dict())
    assert "hunter2" not in document
    assert not [secret for secret in SECRETS if secret in document]
    assert run.provenance["command"][:4] == ["launcher", "render", "--preset", "smoke"]
