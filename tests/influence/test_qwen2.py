"""A Qwen2 of the transformers library as a trainer runs it: padded, packed, checkpointed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from influence import InfluenceTracer, TracerConfig
from tests.influence.brute_force import relative_error
from tests.influence.tiny_model import VOCABULARY, Response, TokenBatch, make_responses, packed, padded

pytestmark = pytest.mark.slow

CONFIG = TracerConfig(projection_dim_factor=4)
RESPONSES = make_responses(num_responses=6, num_groups=2)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attn_implementation="sdpa",
        )
    ).double()


def scores(model: Any, batch: TokenBatch, responses: list[Response]) -> Tensor:
    tracer = InfluenceTracer(model, CONFIG)
    with tracer.capture(batch.row_ids):
        visible = (batch.segment_ids >= 0).long() if batch.input_ids.shape[0] > 1 else None
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=visible,
            position_ids=batch.position_ids,
            use_cache=False,
        ).logits
        taken = logits.log_softmax(-1).gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
        (taken * batch.weights).sum().backward()
    rows = tracer.pop_rows([r.group for r in responses], [r.contrast for r in responses])
    tracer.remove()
    return torch.cat([row.scores for row in rows])


def test_every_decoder_linear_is_found(model: Any) -> None:
    names = InfluenceTracer(model, CONFIG).module_names
    assert len(names) == 7 * model.config.num_hidden_layers
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert not any("lm_head" in name for name in names)


def test_padded_packed_and_checkpointed_agree(model: Any) -> None:
    expected = scores(model, padded(RESPONSES), RESPONSES)
    assert relative_error(scores(model, packed(RESPONSES), RESPONSES), expected) < 1e-10
    model.train()
    for use_reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert relative_error(scores(model, packed(RESPONSES), RESPONSES), expected) < 1e-10
        model.gradient_checkpointing_disable()
