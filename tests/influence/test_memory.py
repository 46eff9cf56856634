"""What `estimate_memory` states in advance, against the tensors that a real capture and solve hold."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from influence import InfluenceTracer, MemoryEstimate, TracerConfig, estimate_memory
from influence.config import TracerConfigError
from influence.groups import GatheredRows, plan_groups
from influence.kernels import SLOT_ALIGNMENT
from influence.layout import FactorLayout
from influence.token_hessian import CapturedRow, TokenFactors
from influence.weights import row_weights
from tests.influence.tiny_model import TinyTransformer, make_responses, padded
from tests.influence.tracing import capture

CONFIG = TracerConfig(projection_dim_factor=2)
RESPONSES = make_responses(num_responses=8, num_groups=2)
NUM_TOKENS = sum(r.num_scores for r in RESPONSES)


class QwenShaped(nn.Module):
    """The linears of a decoder of Qwen2.5-1.5B's shape, tied head and all."""

    def __init__(self, num_layers: int = 28) -> None:
        super().__init__()
        shapes = {
            "q_proj": (1536, 1536),
            "k_proj": (1536, 256),
            "v_proj": (1536, 256),
            "o_proj": (1536, 1536),
            "gate_proj": (1536, 8960),
            "up_proj": (1536, 8960),
            "down_proj": (8960, 1536),
        }
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
            for _ in range(num_layers)
        )


class PeakOfAllocations(TorchDispatchMode):
    """The most bytes that tensors made inside held at a time; `others` were there before."""

    def __init__(self, others: list[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._others = {tensor.untyped_storage()._cdata for tensor in others}
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._live and storage._cdata not in self._others:
                    self._live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._live.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_tokens", [-1, 3])
def test_what_is_captured_takes_what_was_stated(dtype: torch.dtype, max_tokens: int) -> None:
    model = TinyTransformer(dtype=dtype)
    config = replace(CONFIG, max_tokens_per_response=max_tokens)
    stated = estimate_memory(model, config, NUM_TOKENS, rows=len(RESPONSES))
    tracer = InfluenceTracer(model, config)
    for responses in (RESPONSES[:3], RESPONSES[3:]):
        capture(tracer, model, padded(responses))
    tracer.remove()
    batches = tracer._capture.micro_batches
    factors = [part for batch in batches for part in batch.factors]
    num_tokens = sum(batch.selection.row_offsets[-1] for batch in batches)
    num_slots = sum(batch.selection.num_slots for batch in batches)

    assert sum(part.nbytes for part in factors) == stated.bytes_per_token * num_slots
    # The padding of rows is stated at its most.
    assert stated.factors_bytes == stated.bytes_per_token * (num_tokens + 8 * (SLOT_ALIGNMENT - 1))
    assert num_slots <= num_tokens + 8 * (SLOT_ALIGNMENT - 1)
    assert sum(batch.gradients.nbytes for batch in batches) == stated.gradients_bytes
    single = sum(signs.nbytes for module in tracer._modules for signs in module._signs.values())
    stacked = sum(signs.nbytes for signs in tracer._capture._stacked_signs.values())
    # All inputs but those of o_proj and down_proj are shared.
    assert 0.75 * stated.signs_bytes <= single + stacked <= stated.signs_bytes


def test_the_reference_model_needs_9_kb_a_token() -> None:
    with torch.device("meta"):
        model = QwenShaped().to(torch.bfloat16)
    stated = estimate_memory(model, TracerConfig(), 733_870, rows=96)
    assert stated.bytes_per_token == 4508 * 2
    assert stated.factors_bytes == pytest.approx(6.62e9, rel=0.005)
    assert stated.gradients_bytes == 96 * 19_992 * 4
    assert stated.total_bytes <= 9_100 * 733_870 * 1.05
    # Under autocast the weights are float32 and the layers compute in bfloat16.
    in_float32 = model.to(torch.float32)
    assert estimate_memory(in_float32, TracerConfig(), 1000, dtype=torch.bfloat16).bytes_per_token == 9016
    assert estimate_memory(in_float32, TracerConfig(), 1000).bytes_per_token == 18_032


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize(
    ("hessian", "num_groups", "group_size"),
    [("response", 6, 16), ("response", 2, 64), ("identity", 6, 16), ("token", 3, 8)],
)
def test_solving_takes_what_was_stated(
    hessian: str, num_groups: int, group_size: int, exclude_self: bool
) -> None:
    with torch.device("meta"):
        model = QwenShaped(num_layers=2)
    config = TracerConfig(hessian=hessian, exclude_self=exclude_self)
    num_rows, num_tokens = num_groups * group_size, 1024
    stated = estimate_memory(
        model, config, num_rows * num_tokens, rows=num_rows, responses_per_group=group_size
    )
    shapes = [
        (k.weight.shape[0] // 256, k.weight.shape[1] // 256)
        for k in model.modules()
        if isinstance(k, nn.Linear)
    ]
    layout = FactorLayout.of_shapes(shapes)
    groups = [row // group_size for row in range(num_rows)]
    contrast = [1.0 if row % 2 else -1.0 for row in range(num_rows)]
    rows = GatheredRows(groups, contrast, range(num_rows), torch.randn(num_rows, layout.gradient_dim))
    factors = [torch.randn(layout.num_factors, num_tokens) for _ in range(num_rows)]
    plan = plan_groups(groups, contrast, range(num_rows), config)
    captured = TokenFactors([CapturedRow([part]) for part in factors])
    with torch.no_grad(), PeakOfAllocations([rows.gradients, *factors]) as allocations:
        row_weights(rows, plan, layout, config, captured)
    # The gathered gradients were there, and the scores come later.
    others = num_rows * layout.gradient_dim * 4 + (num_rows * (num_tokens + SLOT_ALIGNMENT - 1)) * 4
    assert allocations.peak == pytest.approx(stated.pop_rows_bytes - others, rel=0.15)


def test_more_ranks_cost_their_rows_only() -> None:
    one = estimate_memory(TinyTransformer(), CONFIG, 100, rows=4)
    four = estimate_memory(TinyTransformer(), CONFIG, 100, rows=4, all_rows=16)
    assert four.captured_bytes == one.captured_bytes
    assert four.pop_rows_bytes > one.pop_rows_bytes


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"tokens": -1}, {"rows": 0}, {"rows": 4, "all_rows": 3}, {"responses_per_group": 0}):
        with pytest.raises(ValueError, match="expected tokens >= 0"):
            estimate_memory(TinyTransformer(), CONFIG, **{"tokens": 1, **wrong})
    with pytest.raises(TracerConfigError, match="matches no layer"):
        estimate_memory(TinyTransformer(), replace(CONFIG, modules=("no_such",)), 1)


def test_what_is_no_number_or_type_is_refused() -> None:
    wrong: list[dict[str, Any]] = [
        {"tokens": 1.5},
        {"tokens": True},
        {"rows": 2.0},
        {"responses_per_group": "16"},
    ]
    for arguments in wrong:
        with pytest.raises(TypeError, match="expected whole numbers"):
            estimate_memory(TinyTransformer(), CONFIG, **{"tokens": 1, **arguments})
    for dtype in ("bf16", torch.int8):
        with pytest.raises(TypeError, match="expected a floating type"):
            estimate_memory(TinyTransformer(), CONFIG, 1, dtype=dtype)


def test_a_layer_that_runs_twice_doubles_the_factors() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    config = TracerConfig(modules=("0",), projection_dim_factor=8)
    stated = estimate_memory(model, config, 32, rows=2)
    tracer = InfluenceTracer(model, config)
    with tracer.capture(torch.arange(2).repeat_interleave(16)[None]):
        model(model(torch.randn(1, 32, 64))).sum().backward()
    (batch,) = tracer._capture.micro_batches
    assert sum(part.nbytes for part in batch.factors) == 2 * 32 * stated.bytes_per_token


def test_an_estimate_is_printed_with_its_sums() -> None:
    estimate = MemoryEstimate(
        bytes_per_token=9016,
        factors_bytes=6_000_000,
        gradients_bytes=700_000,
        signs_bytes=34_000,
        weights_bytes=5,
        pop_rows_bytes=1_266_000,
    )
    assert str(estimate) == "9,016 bytes a token, 6.734 MB captured + 1.266 MB in pop_rows = 8.000 MB"
