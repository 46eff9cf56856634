"""``G_r`` of every module against plain autograd: a response's weight gradient, projected on both sides.

With all positions of a response captured, ``sum_t u_t v_t^T = P_out (dL_r / dW) P_in^T`` exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from influence import TracerConfig
from influence.capture import ActivationCapture
from influence.config import DEFAULT_MODULES
from influence.modules import TracedModule, find_modules
from influence.projection import projection_matrix
from tests.influence.brute_force import relative_error
from tests.influence.tiny_model import (
    Response,
    TinyTransformer,
    TokenBatch,
    make_responses,
    objective,
    packed,
    padded,
)

RESPONSES = make_responses(num_responses=5, num_groups=2)
CONFIG = TracerConfig(projection_dim_factor=2)


@dataclass(frozen=True)
class Case:
    """A model, and the patterns of what is traced in it."""

    make: Callable[[str | None], nn.Module]
    modules: tuple[str, ...] = DEFAULT_MODULES


def tied(checkpointing: str | None) -> nn.Module:
    model = TinyTransformer(checkpointing=checkpointing)
    model.lm_head.weight = model.embed_tokens.weight
    return model


def frozen_start(checkpointing: str | None) -> nn.Module:
    """Layer 0 sees an input that needs no gradient."""
    model = TinyTransformer(checkpointing=checkpointing)
    for module in (model.embed_tokens, model.embed_positions, model.layers[0].input_layernorm):
        module.requires_grad_(False)
    return model


def lora(checkpointing: str | None) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    settings = LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    return get_peft_model(TinyTransformer(checkpointing=checkpointing), settings).double()


CASES = {
    "grouped queries": Case(lambda kind: TinyTransformer(checkpointing=kind)),
    "run twice": Case(lambda kind: TinyTransformer(checkpointing=kind, num_passes=2)),
    "three layers": Case(lambda kind: TinyTransformer(checkpointing=kind, num_layers=3, kv_width=8)),
    "tied": Case(tied),
    "frozen start": Case(frozen_start),
    "adapters": Case(lora, ("lora_A.*", "lora_B.*")),
}
# Reentrant checkpoints pass no gradient on where no input of theirs needs one.
CUT_BY_REENTRANT = ("frozen start", "adapters")


def all_positions(batch: TokenBatch, responses: list[Response]) -> TokenBatch:
    """The batch with every token of a response captured, its prompt's too."""
    row_ids = torch.full_like(batch.row_ids, -1)
    if batch.row_ids.shape[0] == 1:
        for segment, response in enumerate(responses):
            row_ids[batch.segment_ids == segment] = response.row_id
    else:
        for line, response in enumerate(responses):
            row_ids[line, batch.segment_ids[line] == 0] = response.row_id
    return replace(batch, row_ids=row_ids)


def captured(
    model: nn.Module, modules: list[TracedModule], batch: TokenBatch, run: Callable[[Any, Tensor], None]
) -> dict[str, Tensor]:
    """By module: [R, k_out, k_in]."""
    recorder = ActivationCapture(modules, torch.float64)
    with recorder.record(batch.row_ids) as micro_batch:
        run(micro_batch, objective(model, batch))
    recorder.remove()
    gradients_RD = recorder.micro_batches[0].gradients
    return {
        module.name: gradients_RD[:, place.gradient_start : place.gradient_start + place.dim].view(
            -1, place.k_out, place.k_in
        )
        for module, place in zip(modules, recorder.layout.places, strict=True)
    }


def by_autograd(model: nn.Module, modules: list[TracedModule], response: Response) -> dict[str, Tensor]:
    """``P_out (dL_r / dW) P_in^T`` by module."""
    weights = [module.module.weight for module in modules]
    gradients = torch.autograd.grad(objective(model, padded([response])), weights)
    found = {}
    for module, gradient in zip(modules, gradients, strict=True):
        P_in = projection_matrix(module.name, "in", gradient.shape[1], module.k_in, CONFIG.seed)
        P_out = projection_matrix(module.name, "out", gradient.shape[0], module.k_out, CONFIG.seed)
        found[module.name] = P_out @ gradient @ P_in.T
    return found


@pytest.mark.parametrize("lay_out", [padded, packed])
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        pytest.param(
            name, kind, id=f"{name}-{kind}", marks=[pytest.mark.slow] if kind or name == "adapters" else []
        )
        for name in CASES
        for kind in (None, "non_reentrant", "reentrant")
        if not (kind == "reentrant" and name in CUT_BY_REENTRANT)
    ],
)
def test_captured_gradients_are_projected_weight_gradients(
    name: str, checkpointing: str | None, lay_out: Callable[[list[Response]], TokenBatch]
) -> None:
    case = CASES[name]
    model, plain = case.make(checkpointing), case.make(None)
    config = replace(CONFIG, modules=case.modules)
    expected = [by_autograd(plain, find_modules(plain, config)[0], r) for r in RESPONSES]
    modules, _ = find_modules(model, config)
    batch = all_positions(lay_out(RESPONSES), RESPONSES)
    ways = [lambda _, value: value.backward()]
    if checkpointing != "reentrant":
        ways.append(lambda micro_batch, value: micro_batch.backward(value))
    for run in ways:
        found = captured(model, modules, batch, run)
        assert set(found) == set(expected[0])
        for module, gradients_ROI in found.items():
            by_response = torch.stack([row[module] for row in expected])
            assert relative_error(gradients_ROI, by_response) < 1e-11, module


def test_a_tied_head_that_is_traced_has_its_own_gradient_without_the_embeddings() -> None:
    # The weight's gradient by autograd would have the embeddings' part, too.
    model, untied = tied(None), tied(None)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    config = replace(CONFIG, modules=("lm_head",))
    batch = all_positions(padded(RESPONSES), RESPONSES)
    found = captured(model, find_modules(model, config)[0], batch, lambda _, value: value.backward())
    for row, response in enumerate(RESPONSES):
        expected = by_autograd(untied, find_modules(untied, config)[0], response)["lm_head"]
        assert relative_error(found["lm_head"][row], expected) < 1e-11
