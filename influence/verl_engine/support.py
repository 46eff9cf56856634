"""Settings of verl's engine under which a capture would be wrong, refused before the model is built."""

from __future__ import annotations

from typing import Any

import torch
from verl.utils.torch_dtypes import PrecisionType

from influence.verl_engine.compose import ConfigurationError, require_dense
from influence.verl_engine.fused import FUSED


def require_traceable(model_config: Any, engine_config: Any, capture: str) -> None:
    """Refuse an engine whose layers, tokens or loss the tracer does not see whole.

    The trainer refuses most of this before it starts (`require_supported`); here it holds for whoever
    builds the engine.

    Args:
        model_config: verl's ``HFModelConfig``.
        engine_config: verl's ``FSDPEngineConfig``.
        capture: the tracer's option.

    Raises:
        ConfigurationError: names the setting and what to use instead.
    """
    if engine_config.strategy not in ("fsdp", "fsdp2"):
        raise ConfigurationError(
            f"actor strategy {engine_config.strategy!r} is not supported: use fsdp2 or fsdp"
        )
    for name in ("ulysses_sequence_parallel_size", "tensor_parallel_size", "tp_size"):
        if (getattr(engine_config, name, None) or 1) > 1:
            raise ConfigurationError(
                f"fsdp_config.{name} is {getattr(engine_config, name)}: layers that see a part of the tokens "
                "or of the width cannot be traced; set it to 1"
            )
    precision = getattr(engine_config, "mixed_precision", None) or {}
    if PrecisionType.to_dtype(precision.get("param_dtype", "bf16")) == torch.float16:
        raise ConfigurationError(
            "fsdp_config.mixed_precision.param_dtype is fp16, whose loss scaling is not supported: "
            "use bf16 or fp32"
        )
    if getattr(getattr(engine_config, "qat", None), "enable", False):
        raise ConfigurationError("fsdp_config.qat.enable replaces the traced layers: set it to False")
    for name in ("use_fused_kernels", "use_liger"):
        if getattr(model_config, name, False):
            raise ConfigurationError(f"model.{name} bypasses the traced layers: set it to False")
    if getattr(model_config, "enable_activation_offload", False) and capture != FUSED:
        raise ConfigurationError(
            "model.enable_activation_offload counts on one backward through all layers a forward, which "
            f"influence.capture: {capture} does not keep to: set it to False, or use capture: fused"
        )
    if getattr(model_config, "hf_config", None) is not None:
        require_dense(model_config.hf_config)
