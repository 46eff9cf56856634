"""What the hooks see, and that they change nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from influence import InfluenceTracer, TracerConfig
from influence.capture import ActivationCapture, CaptureError
from influence.config import TracerConfigError
from influence.kernels import SLOT_ALIGNMENT
from influence.micro_batch import MicroBatch, response_dtype, storage_dtype
from influence.modules import find_modules
from influence.selection import select_tokens
from tests.influence.brute_force import relative_error
from tests.influence.tiny_model import (
    TinyTransformer,
    TokenBatch,
    make_responses,
    objective,
    packed,
    padded,
)
from tests.influence.tracing import capture, trace

CONFIG = TracerConfig(projection_dim_factor=2)
RESPONSES = make_responses(num_responses=6, num_groups=2)
# The first use of either makes torch import its compiler, for seconds.
CHECKPOINTING = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("reentrant", "non_reentrant")]


def all_scores(model: TinyTransformer, config: TracerConfig = CONFIG) -> Tensor:
    rows = trace(model, [RESPONSES[:4], RESPONSES[4:]], config)
    return torch.cat([rows[r.row_id].scores for r in RESPONSES])


@pytest.mark.parametrize("checkpointing", [None, *CHECKPOINTING])
def test_gradients_are_bitwise_equal_with_and_without_tracing(checkpointing: str | None) -> None:
    plain = TinyTransformer(checkpointing=checkpointing, dtype=torch.float32)
    traced = copy.deepcopy(plain)
    tracer = InfluenceTracer(traced, CONFIG)
    batch = padded(RESPONSES)
    objective(plain, batch).backward()
    capture(tracer, traced, batch)
    for (name, expected), found in zip(plain.named_parameters(), traced.parameters(), strict=True):
        assert expected.grad is not None, name
        assert torch.equal(expected.grad, found.grad), name


def test_nothing_is_added_to_the_model_and_remove_takes_the_hooks_off() -> None:
    model = TinyTransformer()
    before = (
        list(model.state_dict()),
        [n for n, _ in model.named_modules()],
        [n for n, _ in model.named_buffers()],
    )
    tracer = InfluenceTracer(model, CONFIG)
    capture(tracer, model, padded(RESPONSES))
    after = (
        list(model.state_dict()),
        [n for n, _ in model.named_modules()],
        [n for n, _ in model.named_buffers()],
    )
    assert before == after
    tracer.remove()
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(CaptureError, match="removed"):
        capture(tracer, model, padded(RESPONSES))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copied", "pickled"],
)
def test_a_copy_of_a_traced_model_takes_nothing_along(
    duplicate: Callable[[TinyTransformer], TinyTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = TinyTransformer(), padded(RESPONSES)
    tracer = InfluenceTracer(model, CONFIG)
    capture(tracer, model, batch)

    def refuse(captured: MicroBatch, protocol: int) -> None:
        pytest.fail("what was captured is copied, too")

    monkeypatch.setattr(MicroBatch, "__reduce_ex__", refuse)
    twin = duplicate(model)
    monkeypatch.undo()
    # It runs, unseen by the tracer of the original, and can have a tracer of its own.
    with tracer.capture(torch.full_like(batch.row_ids, -1)) as handle:
        objective(twin, batch).backward()
        handle.discard()
    rows = tracer.pop_rows([r.group for r in RESPONSES], [r.contrast for r in RESPONSES])
    again = trace(twin, [RESPONSES], CONFIG)
    assert all(torch.equal(row.scores, again[row.row_id].scores) for row in rows)


@pytest.mark.parametrize("num_passes", [1, 2])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_checkpointing_does_not_matter(checkpointing: str, num_passes: int) -> None:
    expected = all_scores(TinyTransformer(num_passes=num_passes))
    found = all_scores(TinyTransformer(num_passes=num_passes, checkpointing=checkpointing))
    assert relative_error(found, expected) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("is_traced_first", [True, False])
def test_a_compiled_model_scores_as_it_does_uncompiled(is_traced_first: bool) -> None:
    expected = all_scores(TinyTransformer())
    model, batch = TinyTransformer(), padded(RESPONSES)
    tracer = InfluenceTracer(model, CONFIG) if is_traced_first else None
    compiled = torch.compile(model, backend="aot_eager")
    if tracer is None:
        objective(compiled, batch).backward()
        tracer = InfluenceTracer(compiled, CONFIG)
    capture(tracer, compiled, batch)
    rows = tracer.pop_rows([r.group for r in RESPONSES], [r.contrast for r in RESPONSES])
    assert relative_error(torch.cat([row.scores for row in rows]), expected) < 1e-12


@pytest.mark.slow
def test_a_compiled_model_may_run_outside_of_captures_in_between() -> None:
    expected = all_scores(TinyTransformer())
    model, batch = TinyTransformer(), padded(RESPONSES)
    tracer, compiled = InfluenceTracer(model, CONFIG), torch.compile(model, backend="aot_eager")
    for _ in range(4):
        capture(tracer, compiled, batch)
        rows = tracer.pop_rows([r.group for r in RESPONSES], [r.contrast for r in RESPONSES])
        assert relative_error(torch.cat([row.scores for row in rows]), expected) < 1e-12
        objective(compiled, batch).backward()


class WritingModel(nn.Module):
    """Layers with and without a bias whose outputs are then written into, or changed out of place."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_place = in_place
        for name, bias in (("q_proj", True), ("k_proj", True), ("v_proj", False), ("o_proj", True)):
            self.register_module(name, nn.Linear(8, 8, bias=bias, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        q, first = self.q_proj(x), self.k_proj(x).tanh()
        again, v = self.k_proj(first), self.v_proj(first)
        if not self.in_place:
            q = torch.cat([2 * q[..., :4], q[..., 4:]], -1)
            return self.o_proj((q + again.relu() + 3 * v).tanh()) + x
        q[..., :4] = 2 * q[..., :4]
        again.relu_()
        v.mul_(3)
        out = self.o_proj((q + again + v).tanh())
        out += x
        return out


@pytest.mark.parametrize("uses_handle", [False, True])
def test_outputs_may_be_written_into(uses_handle: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    row_ids = torch.arange(4)[:, None].expand(4, 5).contiguous()
    scores = []
    for in_place in (False, True):
        model = WritingModel(in_place=in_place)
        tracer = InfluenceTracer(model, replace(CONFIG, modules=("*_proj",)))
        with tracer.capture(row_ids) as micro_batch:
            loss = model(x).square().sum()
            if uses_handle:
                micro_batch.backward(loss)
            else:
                loss.backward()
        rows = tracer.pop_rows([0, 0, 0, 0], [1.0, -1.0, 1.0, -1.0])
        scores.append(torch.cat([row.scores for row in rows]))
    expected, found = scores
    assert relative_error(found, expected) < 1e-12


def test_the_first_layer_counts_though_its_input_needs_no_gradient() -> None:
    model = TinyTransformer()
    expected = all_scores(model)
    model.embed_tokens.requires_grad_(False)
    model.embed_positions.requires_grad_(False)
    model.layers[0].input_layernorm.requires_grad_(False)
    assert relative_error(all_scores(model), expected) < 1e-12


@pytest.mark.slow
def test_reentrant_checkpointing_that_cuts_the_graph_is_an_error_not_a_zero() -> None:
    model = TinyTransformer(checkpointing="reentrant")
    model.embed_tokens.requires_grad_(False)
    model.embed_positions.requires_grad_(False)
    # Reentrant checkpoints pass a gradient on only where an input needs one; torch warns of it.
    with (
        pytest.warns(UserWarning, match="requires_grad"),
        pytest.raises(CaptureError, match=r"no gradient reached layers\.0\.self_attn\.q_proj \(14 of 14"),
    ):
        all_scores(model)


def test_every_decoder_linear_is_traced_and_lm_head_is_not() -> None:
    names = InfluenceTracer(TinyTransformer(num_layers=3), CONFIG).module_names
    attention = [f"self_attn.{p}_proj" for p in "qkvo"]
    mlp = [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert set(names) == {f"layers.{i}.{name}" for i in range(3) for name in attention + mlp}


def test_patterns_choose_modules() -> None:
    def names(*patterns: str) -> tuple[str, ...]:
        return InfluenceTracer(TinyTransformer(), TracerConfig(modules=patterns)).module_names

    assert names("layers.1.self_attn.q_proj") == ("layers.1.self_attn.q_proj",)
    assert names("0.mlp.*", "lm_head") == (
        *(f"layers.0.mlp.{p}_proj" for p in ("gate", "up", "down")),
        "lm_head",
    )
    assert names("?_proj", "q_proj") == tuple(
        f"layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkvo"
    )


def test_patterns_that_match_nothing_name_what_is_near() -> None:
    with pytest.raises(TracerConfigError, match=r"'q_prj' matches no layer.*near: .*q_proj"):
        InfluenceTracer(TinyTransformer(), TracerConfig(modules=("k_proj", "q_prj")))
    with pytest.raises(TracerConfigError, match=r"'zzz'.*end in: down_proj, gate_proj"):
        InfluenceTracer(TinyTransformer(), TracerConfig(modules=("zzz",)))
    with pytest.raises(TracerConfigError, match=r"'mlp' matches no nn\.Linear"):
        InfluenceTracer(TinyTransformer(), TracerConfig(modules=("mlp",)))


def test_two_layers_of_one_canonical_name_are_refused() -> None:
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "module": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})
    with pytest.raises(TracerConfigError, match=r"q_proj and module\.q_proj are both q_proj"):
        find_modules(model, replace(CONFIG, modules=("q_proj",)))


def test_frozen_layers_are_not_traced() -> None:
    model = TinyTransformer()
    model.layers[0].self_attn.q_proj.requires_grad_(False)
    assert "layers.0.self_attn.q_proj" not in InfluenceTracer(model, CONFIG).module_names
    with pytest.raises(TracerConfigError, match=r"frozen.*lora_A"):
        InfluenceTracer(model, TracerConfig(modules=("layers.0.self_attn.q_proj",)))


def record(model: TinyTransformer, batch: TokenBatch, dtype: torch.dtype = torch.float64) -> MicroBatch:
    """What one micro-batch leaves behind; the hooks are off the model again."""
    recorder = ActivationCapture(find_modules(model, CONFIG)[0], dtype)
    with recorder.record(batch.row_ids):
        objective(model, batch).backward()
    recorder.remove()
    return recorder.micro_batches[0]


def test_bfloat16_model_stores_bfloat16_and_adds_up_in_float32() -> None:
    captured = record(TinyTransformer(dtype=torch.bfloat16), padded(RESPONSES), torch.float32)
    assert {factors.dtype for factors in captured.factors} == {torch.bfloat16}
    assert captured.gradients.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_models_store_what_they_compute_in(dtype: torch.dtype) -> None:
    captured = record(TinyTransformer(dtype=dtype), padded(RESPONSES), dtype)
    assert captured.factors[0].dtype == captured.gradients.dtype == dtype


def test_autocast_stores_what_the_layers_compute_in() -> None:
    model = TinyTransformer(dtype=torch.float32)
    recorder = ActivationCapture(find_modules(model, CONFIG)[0], torch.float32)
    batch = padded(RESPONSES)
    with recorder.record(batch.row_ids):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = objective(model, batch)
        loss.backward()
    assert recorder.micro_batches[0].factors[0].dtype == torch.bfloat16


def test_bfloat16_scores_stay_close_to_float64() -> None:
    exact = all_scores(TinyTransformer())
    rough = all_scores(TinyTransformer(dtype=torch.bfloat16)).double()
    # The model itself is rounded here, not only the stored factors.
    assert torch.corrcoef(torch.stack([exact, rough]))[0, 1] > 0.98


def test_what_is_added_up_is_never_kept_in_half_precision() -> None:
    kinds = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    assert [storage_dtype(k) for k in kinds] == [torch.bfloat16, torch.float32, torch.float32, torch.float64]
    assert [response_dtype(k) for k in kinds] == [torch.float32] * 3 + [torch.float64]


class TestMisuse:
    def test_forward_outside(self) -> None:
        model, batch = TinyTransformer(), padded(RESPONSES)
        tracer = InfluenceTracer(model, CONFIG)
        loss = objective(model, batch)
        with pytest.raises(CaptureError, match="forward belongs inside"), tracer.capture(batch.row_ids):
            loss.backward()

    def test_no_backward(self) -> None:
        model, batch = TinyTransformer(), padded(RESPONSES)
        tracer = InfluenceTracer(model, CONFIG)
        with pytest.raises(CaptureError, match="no gradient reached"), tracer.capture(batch.row_ids):
            objective(model, batch)

    def test_another_grid_than_the_model_sees(self) -> None:
        model, batch = TinyTransformer(), padded(RESPONSES)
        tracer = InfluenceTracer(model, CONFIG)
        with (
            pytest.raises(CaptureError, match=r"q_proj.*not supported"),
            tracer.capture(batch.row_ids[:, 1:]),
        ):
            objective(model, batch).backward()

    def test_the_same_number_of_tokens_in_another_shape(self) -> None:
        model, batch = TinyTransformer(), padded(RESPONSES)
        tracer = InfluenceTracer(model, CONFIG)
        with (
            pytest.raises(CaptureError, match=r"shape \(6, 9, 8\) where row_ids asks for tokens \(9, 6\)"),
            tracer.capture(batch.row_ids.T.contiguous()),
        ):
            objective(model, batch).backward()

    def test_a_row_in_two_micro_batches(self) -> None:
        model = TinyTransformer()
        tracer = InfluenceTracer(model, CONFIG)
        capture(tracer, model, padded(RESPONSES[:3]))
        with pytest.raises(CaptureError, match="row 2 was captured before"):
            capture(tracer, model, padded(RESPONSES[2:]))

    def test_capture_inside_capture(self) -> None:
        model, batch = TinyTransformer(), padded(RESPONSES)
        tracer = InfluenceTracer(model, CONFIG)
        with pytest.raises(CaptureError, match=r"capture\(\) inside"), tracer.capture(batch.row_ids):
            capture(tracer, model, batch)
        with pytest.raises(CaptureError, match=r"pop_rows\(\) inside"), tracer.capture(batch.row_ids):
            tracer.pop_rows([], [])

    def test_a_micro_batch_that_raises_leaves_nothing_behind(self) -> None:
        model, batch = TinyTransformer(), padded(RESPONSES)
        tracer = InfluenceTracer(model, CONFIG)

        def run_out_of_memory() -> None:
            with tracer.capture(batch.row_ids):
                objective(model, batch).backward()
                raise MemoryError

        with pytest.raises(MemoryError):
            run_out_of_memory()
        assert tracer.pop_rows([], []) == []
        capture(tracer, model, batch)

    @pytest.mark.parametrize(
        "row_ids",
        [torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64), torch.tensor([[0, -2]])],
        ids=["floats", "one dimension", "below -1"],
    )
    def test_row_ids_of_another_kind(self, row_ids: Tensor) -> None:
        with (
            pytest.raises(ValueError, match="row_ids"),
            InfluenceTracer(TinyTransformer(), CONFIG).capture(row_ids),
        ):
            pass

    def test_backward_after_the_block_is_not_captured(self) -> None:
        model, batch = TinyTransformer(), padded(RESPONSES)
        tracer = InfluenceTracer(model, CONFIG)
        with tracer.capture(batch.row_ids):
            loss = objective(model, batch)
            loss.backward(retain_graph=True)
        loss.backward()
        twice = tracer.pop_rows([0] * 6, [1.0] * 6)
        capture(tracer, model, batch)
        once = tracer.pop_rows([0] * 6, [1.0] * 6)
        assert all(torch.equal(a.scores, b.scores) for a, b in zip(once, twice, strict=True))


def test_a_micro_batch_without_captured_tokens_is_allowed() -> None:
    model, batch = TinyTransformer(), packed(RESPONSES)
    tracer = InfluenceTracer(model, CONFIG)
    with tracer.capture(torch.full_like(batch.row_ids, -1)):
        objective(model, batch).backward()
    assert tracer.pop_rows([], []) == []


def test_evaluation_inside_capture_is_not_captured() -> None:
    model, batch = TinyTransformer(), padded(RESPONSES)
    expected = all_scores(model)
    tracer = InfluenceTracer(model, CONFIG)
    with tracer.capture(batch.row_ids):
        with torch.no_grad():
            objective(model, batch)
        objective(model, batch).backward()
    rows = tracer.pop_rows([r.group for r in RESPONSES], [r.contrast for r in RESPONSES])
    assert relative_error(torch.cat([row.scores for row in rows]), expected) < 1e-12


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=60), st.sampled_from([-1, 1, 2, 3, 7]))
def test_selection_sorts_tokens_by_row_and_caps_each_row(ids: list[int], most: int) -> None:
    selection = select_tokens(torch.tensor([ids]), most)
    assert list(selection.row_ids) == sorted(set(ids) - {-1})
    for index, row in enumerate(selection.row_ids):
        mine = [i for i, value in enumerate(ids) if value == row]
        part = slice(*selection.row_offsets[index : index + 2])
        positions = selection.positions[part].tolist()
        assert selection.token_index[part].tolist() == [mine[p] for p in positions]
        assert positions == sorted(set(positions))
        assert len(positions) == (len(mine) if most == -1 else min(most, len(mine)))
        if len(positions) > 1:
            gaps = [b - a for a, b in pairwise(positions)]
            assert max(gaps) - min(gaps) <= 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=80), st.sampled_from([-1, 1, 3, 17]))
def test_every_captured_token_has_a_slot_and_rows_start_aligned(ids: list[int], most: int) -> None:
    selection = select_tokens(torch.tensor([ids]), most)
    assert selection.num_slots % SLOT_ALIGNMENT == 0
    slots = selection.row_slots.tolist()
    assert [first for first, _ in slots] == [
        end + (-end) % SLOT_ALIGNMENT for end in [0, *(end for _, end in slots)][: len(slots)]
    ]
    in_rows = [selection.source[first:end].tolist() for first, end in slots]
    assert [token for row in in_rows for token in row] == selection.token_index.tolist()
    assert int((selection.source >= 0).sum()) == len(selection.token_index)
    assert [end - first for first, end in slots] == [b - a for a, b in pairwise(selection.row_offsets)]


def test_capping_keeps_the_middles_of_equal_stretches() -> None:
    assert select_tokens(torch.zeros(1, 10, dtype=torch.int64), 1).positions.tolist() == [5]
    assert select_tokens(torch.zeros(1, 10, dtype=torch.int64), 5).positions.tolist() == [1, 3, 5, 7, 9]


def test_linear_layers_that_see_a_part_of_the_tokens_are_refused() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.expert(x[:, ::2])

    model = Routed()
    tracer = InfluenceTracer(model, TracerConfig(modules=("expert",), projection_dim_factor=1))
    with (
        pytest.raises(CaptureError, match=r"expert: .*experts.*not supported"),
        tracer.capture(torch.zeros(1, 6, dtype=torch.int64)),
    ):
        model(torch.randn(1, 6, 4)).sum().backward()
