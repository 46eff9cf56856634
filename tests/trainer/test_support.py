"""Engines that cannot be traced rightly are refused by the setting's name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.slow

FULL_PRECISION = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


def refuse(capture: str = "auto", **settings: Any) -> None:
    from verl.workers.config import FSDPEngineConfig

    from influence.verl_engine.support import require_traceable

    model = SimpleNamespace(
        use_fused_kernels=False, use_liger=False, enable_activation_offload=False, hf_config=SimpleNamespace()
    )
    engine = {"strategy": "fsdp2", "mixed_precision": FULL_PRECISION}
    for name, value in settings.items():
        if hasattr(model, name):
            setattr(model, name, value)
        else:
            engine[name] = value
    require_traceable(model, FSDPEngineConfig(**engine), capture)


def test_what_is_supported_passes() -> None:
    refuse()
    refuse(mixed_precision=None)
    refuse(mixed_precision={"param_dtype": "bf16"}, strategy="fsdp")
    refuse("fused", enable_activation_offload=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ulysses_sequence_parallel_size": 2}, "ulysses_sequence_parallel_size is 2"),
        ({"mixed_precision": {"param_dtype": "fp16"}}, "param_dtype is fp16"),
        ({"use_fused_kernels": True}, "use_fused_kernels"),
        ({"use_liger": True}, "use_liger"),
        ({"enable_activation_offload": True}, "enable_activation_offload .*capture: auto"),
        ({"hf_config": SimpleNamespace(num_experts=8)}, "mixture of experts"),
    ],
)
def test_what_would_give_wrong_scores_is_named(settings: dict[str, Any], words: str) -> None:
    from influence.verl_engine.compose import ConfigurationError

    with pytest.raises(ConfigurationError, match=words):
        refuse(**settings)
