"""What the handle of a micro-batch does: objectives without weight gradients, scales, second thoughts."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from influence import InfluenceTracer, TracerConfig, kernels
from influence.capture import ActivationCapture, CaptureError
from influence.modules import find_modules
from influence.score import RowScores
from tests.influence.brute_force import relative_error
from tests.influence.tiny_model import (
    Response,
    TinyTransformer,
    TokenBatch,
    make_responses,
    objective,
    packed,
    padded,
    token_terms,
)
from tests.influence.tracing import capture, trace

CONFIG = TracerConfig(projection_dim_factor=2)
RESPONSES = make_responses(num_responses=6, num_groups=2)
EXPECTED = trace(TinyTransformer(), [RESPONSES], CONFIG)
CHECKPOINTING = [None, pytest.param("non_reentrant", marks=pytest.mark.slow)]
LAYOUTS = pytest.mark.parametrize("lay_out", [padded, packed])


def pop(tracer: InfluenceTracer, responses: list[Response] = RESPONSES) -> list[RowScores]:
    return tracer.pop_rows([r.group for r in responses], [r.contrast for r in responses])


def assert_expected(rows: list[RowScores], expected: dict[int, RowScores] = EXPECTED) -> None:
    assert [row.row_id for row in rows] == list(expected)
    for row in rows:
        assert relative_error(row.scores, expected[row.row_id].scores) < 1e-11
        assert row.total == pytest.approx(expected[row.row_id].total, rel=1e-11)


class _Products(TorchDispatchMode):
    """The shapes of all matrix products that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.shapes.append(tuple(result.shape))
        return result


class TestBackward:
    @LAYOUTS
    @pytest.mark.parametrize("checkpointing", CHECKPOINTING)
    def test_it_captures_what_a_backward_captures_and_leaves_no_gradient(
        self, checkpointing: str | None, lay_out: Callable[[list[Response]], TokenBatch]
    ) -> None:
        model, batch = TinyTransformer(checkpointing=checkpointing), lay_out(RESPONSES)
        tracer = InfluenceTracer(model, CONFIG)
        with tracer.capture(batch.row_ids) as micro_batch:
            micro_batch.backward(objective(model, batch))
        assert all(parameter.grad is None for parameter in model.parameters())
        assert_expected(pop(tracer))

    def test_it_computes_no_gradient_of_a_weight(self) -> None:
        model, batch = TinyTransformer(), padded(RESPONSES)
        tracer = InfluenceTracer(model, CONFIG)
        weights = {tuple(p.shape) for n, p in model.named_parameters() if "proj" in n and p.dim() == 2}
        with tracer.capture(batch.row_ids) as micro_batch:
            loss = objective(model, batch)
            with _Products() as without:
                micro_batch.backward(loss, retain_graph=True)
            with _Products() as ordinary:
                loss.backward()
        assert not weights.intersection(without.shapes)
        assert weights <= set(ordinary.shapes)

    @pytest.mark.parametrize("checkpointing", CHECKPOINTING)
    @pytest.mark.parametrize("is_inside", [True, False], ids=["inside", "outside"])
    def test_a_training_loss_shares_the_forward(self, checkpointing: str | None, is_inside: bool) -> None:
        model, batch = TinyTransformer(checkpointing=checkpointing), padded(RESPONSES)
        plain = copy.deepcopy(model)
        tracer = InfluenceTracer(model, CONFIG)
        with tracer.capture(batch.row_ids) as micro_batch:
            terms = token_terms(model, batch)
            loss = terms.square().sum()
            micro_batch.backward(terms.sum(), retain_graph=True)
            if is_inside:
                loss.backward()
        if not is_inside:
            loss.backward()
        token_terms(plain, batch).square().sum().backward()
        for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
            assert expected.grad is not None
            assert torch.equal(found.grad, expected.grad)
        assert_expected(pop(tracer))

    def test_objectives_add_up(self) -> None:
        model, batch = TinyTransformer(), padded(RESPONSES)
        for is_own in (True, False):
            tracer = InfluenceTracer(model, CONFIG)
            with tracer.capture(batch.row_ids) as micro_batch:
                terms = token_terms(model, batch)
                for part in (terms[:2].sum(), terms[2:].sum()):
                    backward = micro_batch.backward if is_own else Tensor.backward
                    backward(part, retain_graph=True)
            assert_expected(pop(tracer))
            tracer.remove()

    @pytest.mark.slow
    def test_reentrant_checkpointing_is_an_error_that_says_what_to_do(self) -> None:
        model, batch = TinyTransformer(checkpointing="reentrant"), padded(RESPONSES)
        tracer = InfluenceTracer(model, CONFIG)
        with pytest.raises(CaptureError, match="use_reentrant=False"), tracer.capture(batch.row_ids) as m:
            m.backward(objective(model, batch))

    def test_before_a_forward_and_after_the_block_it_is_an_error(self) -> None:
        model, batch = TinyTransformer(), padded(RESPONSES)
        tracer = InfluenceTracer(model, CONFIG)
        value = objective(model, batch)
        with pytest.raises(CaptureError, match="forward inside"), tracer.capture(batch.row_ids) as early:
            early.backward(value)
        with tracer.capture(batch.row_ids) as late:
            late.backward(objective(model, batch), retain_graph=True)
        for use in (lambda: late.backward(value), late.discard, lambda: late.roots):
            with pytest.raises(CaptureError, match="inside its capture"):
                use()

    def test_without_rows_it_runs_as_on_ranks_that_have_some(self) -> None:
        model, batch = TinyTransformer(), padded(RESPONSES)
        tracer = InfluenceTracer(model, CONFIG)
        reached = []
        model.layers[0].register_full_backward_hook(lambda *_: reached.append(True))
        with tracer.capture(torch.full_like(batch.row_ids, -1)) as micro_batch:
            micro_batch.backward(objective(model, batch))
        assert pop(tracer, []) == []
        assert all(parameter.grad is None for parameter in model.parameters())


class TestRoots:
    def first_of(self, model: nn.Module, batch: TokenBatch, config: TracerConfig = CONFIG) -> int:
        tracer = InfluenceTracer(model, config)
        with tracer.capture(batch.row_ids) as micro_batch:
            value = objective(model, batch)
            number = len(micro_batch.roots)
            micro_batch.backward(value)
        tracer.remove()
        return number

    def test_they_are_the_outputs_that_depend_on_no_other_traced_one(self) -> None:
        assert self.first_of(TinyTransformer(), padded(RESPONSES)) == 3  # q, k, v of the first layer
        upper = replace(CONFIG, modules=("1.mlp.gate_proj", "1.mlp.down_proj"))
        assert self.first_of(TinyTransformer(), padded(RESPONSES), upper) == 1

    @pytest.mark.parametrize("frozen", ["embeddings", "embeddings and norm"])
    def test_a_frozen_start_does_not_matter(self, frozen: str) -> None:
        model, batch = TinyTransformer(), padded(RESPONSES)
        model.embed_tokens.requires_grad_(False)
        model.embed_positions.requires_grad_(False)
        model.layers[0].input_layernorm.requires_grad_(frozen == "embeddings")
        tracer = InfluenceTracer(model, CONFIG)
        with tracer.capture(batch.row_ids) as micro_batch:
            micro_batch.backward(objective(model, batch))
        assert_expected(pop(tracer))


class TestGradientScale:
    """Capturing ``log pi`` and multiplying by the advantages is capturing ``A log pi``."""

    ADVANTAGES = {r.row_id: r.advantage for r in RESPONSES}  # noqa: RUF012
    UNIT = [replace(r, advantage=1.0) for r in RESPONSES]  # noqa: RUF012

    @pytest.mark.parametrize(
        "scale",
        [ADVANTAGES, list(ADVANTAGES.values()), torch.tensor(list(ADVANTAGES.values()), dtype=torch.float64)],
        ids=["mapping", "sequence", "tensor"],
    )
    @pytest.mark.parametrize("when", ["before", "while"])
    def test_it_multiplies_gradients_and_scores(self, scale: Any, when: str) -> None:
        model, batch = TinyTransformer(), padded(self.UNIT)
        tracer = InfluenceTracer(model, CONFIG)
        with tracer.capture(batch.row_ids, scale if when == "before" else None) as micro_batch:
            objective(model, batch).backward()
            if when == "while":
                micro_batch.gradient_scale = scale
        assert_expected(pop(tracer))

    def test_micro_batches_with_and_without_go_together(self) -> None:
        model = TinyTransformer()
        tracer = InfluenceTracer(model, CONFIG)
        scaled = padded(self.UNIT[3:])
        with tracer.capture(scaled.row_ids, self.ADVANTAGES):
            objective(model, scaled).backward()
        capture(tracer, model, padded(RESPONSES[:3]))
        assert_expected(pop(tracer))

    @pytest.mark.parametrize(
        ("scale", "message"),
        [
            ({0: 1.0}, "no number for row 1"),
            ([1.0], "one number a row"),
            ([1.0] * 5 + [math.nan], "row 5 is nan"),
            ("a", "gradient_scale must be a number for each row, not 'a'"),
            ([None] * 6, "gradient_scale must be a number for each row"),
            (dict.fromkeys(range(6), None), "gradient_scale must be a number for each row"),
            ([10**400] * 6, "gradient_scale must be a number for each row"),
        ],
    )
    def test_it_must_fit_the_rows(self, scale: Any, message: str) -> None:
        tracer = InfluenceTracer(TinyTransformer(), CONFIG)
        with pytest.raises(ValueError, match=message), tracer.capture(padded(RESPONSES).row_ids, scale):
            pass


def test_what_is_discarded_can_be_captured_again() -> None:
    model, batch = TinyTransformer(), padded(RESPONSES)
    tracer = InfluenceTracer(model, CONFIG)
    with tracer.capture(batch.row_ids) as micro_batch:
        value = objective(model, batch)
        micro_batch.discard()
        (3 * value).backward()
    assert pop(tracer, []) == []
    capture(tracer, model, batch)
    assert_expected(pop(tracer))


@contextmanager
def counted_projections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The rows of the factors that each product fills."""
    calls: list[int] = []
    ordinary = kernels.project

    def project(values: Tensor, signs: Tensor, source: Tensor, out: Tensor) -> None:
        calls.append(out.shape[0])
        ordinary(values, signs, source, out)

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "project", project)
        yield calls


class TestNoProductTooMany:
    NUM_INPUTS = 2 * 4  # of a layer: q k v, o, gate up, down
    NUM_MODULES = 2 * 7

    @pytest.mark.parametrize(
        "checkpointing",
        [None, *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("reentrant", "non_reentrant"))],
    )
    def test_one_a_module_and_one_a_shared_input_whatever_is_recomputed(
        self, checkpointing: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, batch = TinyTransformer(checkpointing=checkpointing), padded(RESPONSES)
        tracer = InfluenceTracer(model, CONFIG)
        capture(tracer, model, batch)
        first = pop(tracer)
        with counted_projections(monkeypatch) as calls:
            capture(tracer, model, batch)
        assert len(calls) == self.NUM_INPUTS + self.NUM_MODULES
        assert sum(calls) == tracer._capture.layout.num_factors
        # Sharing is learned in the first micro-batch, and nothing shows of that.
        assert all(torch.equal(a.scores, b.scores) for a, b in zip(first, pop(tracer), strict=True))

    def test_a_module_that_gets_another_input_now_and_then_is_right(self) -> None:
        model = _Fickle()
        config = TracerConfig(modules=("first", "second"), projection_dim_factor=1)
        x = torch.randn(1, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(7))

        def gradients(pattern: list[bool]) -> list[Tensor]:
            recorder = ActivationCapture(find_modules(model, config)[0], torch.float64)
            for row, model.is_shared in enumerate(pattern):
                with recorder.record(torch.full((1, 5), row)):
                    model(x).sin().sum().backward()
            recorder.remove()
            return [batch.gradients for batch in recorder.micro_batches]

        (shared,), (apart,) = gradients([True]), gradients([False])
        assert relative_error(shared, apart) > 0.1
        pattern = [True, True, False, True, False, False, True]
        for is_shared, found in zip(pattern, gradients(pattern), strict=True):
            assert relative_error(found, shared if is_shared else apart) < 1e-12


class _Fickle(nn.Module):
    """Two layers that share their input when told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))
        self.is_shared = True

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x) * self.second(x if self.is_shared else x.sin())
        return y


def test_a_forward_that_is_not_differentiated_leaves_nothing() -> None:
    model, batch = TinyTransformer(), padded(RESPONSES)
    tracer = InfluenceTracer(model, CONFIG)
    with tracer.capture(batch.row_ids):
        objective(model, replace(batch, input_ids=batch.input_ids.flip(0)))
        objective(model, batch).backward()
    assert len(tracer._capture.micro_batches[0].factors) == 1
    assert_expected(pop(tracer))


@pytest.mark.slow
@pytest.mark.parametrize("own_backward", [True, False])
def test_what_checkpointing_frees_is_not_held(own_backward: bool) -> None:
    model, batch = TinyTransformer(checkpointing="non_reentrant"), padded(RESPONSES)
    tracer = InfluenceTracer(model, CONFIG)
    activations: list[StorageWeakRef] = []

    def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        activations.extend(StorageWeakRef(tensor.untyped_storage()) for tensor in (*args, output))

    for layer in model.layers:
        for module in (layer.mlp.down_proj, layer.self_attn.o_proj, layer.mlp.gate_proj):
            module.register_forward_hook(note)

    with tracer.capture(batch.row_ids) as micro_batch:
        value = objective(model, batch)
        num_of_forward = len(activations)
        assert all(reference.expired() for reference in activations)
        assert micro_batch.roots
        if own_backward:
            micro_batch.backward(value)
        else:
            value.backward()
        assert len(activations) > num_of_forward
        assert all(reference.expired() for reference in activations)


def test_a_graph_that_lives_on_does_not_hold_the_factors() -> None:
    model, batch = TinyTransformer(), padded(RESPONSES)
    tracer = InfluenceTracer(model, CONFIG)
    with tracer.capture(batch.row_ids):
        value = objective(model, batch)
        value.backward(retain_graph=True)
    factors = weakref.ref(tracer._capture.micro_batches[0].factors[0])
    pop(tracer)
    assert factors() is None
