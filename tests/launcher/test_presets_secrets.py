"""What counts as a secret, and that none gets into a spec."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    "https://hf_abc@huggingface.co/x",
    "Bearer abc123def",
    "xoxb-" + "1234567890-ab",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_well_known_forms_of_secrets_are_recognised(secret: str) -> None:
    assert is_secret_value(secret)
    assert is_secret_value(f" {secret}\n")
    assert is_secret_value(f"note: {secret}, and more")
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
        "/models/models--Q--x/snapshots/0123456789abcdef0123456789abcdef01234567/model",
        "ssh://git@example.com/repo",
        "/data/sk-learn-toy-dataset-of-rows.parquet",
        "max_tokens=5,pad_token=<pad>",
        "sha256:" + "0a" * 32,
    ],
)
def test_ordinary_settings_are_not(text: str) -> None:
    assert not is_secret_value(text)
    assert redacted(text) == text


def test_a_partition_of_a_data_set_is_no_secret() -> None:
    assert not is_secret_value("/data/key=3/part.parquet")


def test_keys_that_name_secrets() -> None:
    for key in (
        "ray_kwargs.ray_init.runtime_env.env_vars.WANDB_API_KEY",
        "a.HF_TOKEN",
        "a.token",
        "db.password",
        "aws_secret_access_key",
        "x.api-key",
        "+trainer.wandb_token",
        "a.my_secret_token",
        "a.pass",
        "env_vars.DB_PASS",
        "a.bearer",
        "a.WANDB_KEY",
        "a.authorization",
        "a.wandbToken",
        "a.API_KEY_2",
        "a.key",
        "a.tokens_key",
        "a.secrets.db",
    ):
        assert is_secret_key(key), key
    for key in (
        "data.prompt_key",
        "actor.ppo_max_token_len_per_gpu",
        "model.pad_token",
        "data.max_tokens",
        "a.tokenizer",
        "a.skip_special_tokens",
        "a.max_new_tokens",
        "reward_fn_key",
        "a.forward_pass",
        "a.bypass",
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


def test_a_number_below_a_secret_key_is_refused_and_a_switch_is_not() -> None:
    with pytest.raises(SpecError, match=r"^--set verl\.\+a\.token: looks like a secret"):
        PresetLibrary().resolve("smoke", sets=["verl.+a.token=5"])
    for value in ("true", "null", '""'):
        PresetLibrary().resolve("smoke", sets=[f"verl.+a.token={value}"])


def test_a_key_that_is_a_secret_itself_is_not_shown() -> None:
    with pytest.raises(SpecError, match=r"^--set: looks like a secret") as caught:
        PresetLibrary().resolve("smoke", sets=[f"verl.+a.{SECRETS[2]}=1"])
    assert SECRETS[2] not in json.dumps(caught.value.as_dict())


@pytest.mark.parametrize(
    "value", ["${oc.env:HF_TOKEN}", "x ${oc.${a}:b}", "${oc.decode:${a}}", "${\n oc.env:A}"]
)
@pytest.mark.parametrize("path", ["verl.+trainer.my_note", "wandb.project", "data.train_files"])
def test_nothing_is_looked_up_in_the_environment_of_verl(path: str, value: str) -> None:
    written = json.dumps([value] if path == "data.train_files" else value)
    with pytest.raises(SpecError, match="a resolver such as"):
        PresetLibrary().resolve("smoke", sets=[f"{path}={written}"])


def test_references_inside_the_configuration_and_images_by_commit_stay_allowed() -> None:
    PresetLibrary().resolve(
        "smoke", sets=["verl.+trainer.x=${trainer.nnodes}", f"cluster.image=infl:{SECRETS[0]}"]
    )


@pytest.mark.slow
def test_no_key_of_verl_itself_is_taken_for_a_secret() -> None:
    pytest.importorskip("verl")
    from omegaconf import OmegaConf

    from influence.verl_engine.compose import compose_config

    def leaves(value: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for key, below in value.items():
            if isinstance(below, dict) and below:
                yield from leaves(below, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    keys = list(leaves(OmegaConf.to_container(compose_config({}), resolve=False)))
    assert len(keys) > 500
    assert [key for key in keys if is_secret_key(key)] == []


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
            "--set=verl.+a.wandb_token=hunter2=hunter2",
            "x=1 password=hunter2",
        ],
    )
    document = json.dumps(run.to_dict())
    assert "hunter2" not in document
    assert not [secret for secret in SECRETS if secret in document]
    assert run.provenance["command"][:4] == ["launcher", "render", "--preset", "smoke"]
