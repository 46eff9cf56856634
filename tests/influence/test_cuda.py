"""The tracer on a GPU gives the scores of the CPU, and times its phases with events; skipped without one."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields

import pytest
import torch

from influence import InfluenceTracer, TracerConfig
from influence.score import RowScores
from influence.timing import PHASES
from tests.influence.tiny_model import (
    TinyTransformer,
    TokenBatch,
    make_responses,
    objective,
    padded,
    token_terms,
)
from tests.influence.tracing import capture, capture_and_pop

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

CONFIG = TracerConfig(projection_dim_factor=4, contrast="accepted_minus_rejected", objective="log_prob")
RESPONSES = make_responses(8, 2)


def on_gpu(responses: list) -> TokenBatch:  # type: ignore[type-arg]
    """The padded batch, row ids on the CPU as the tracer advises."""
    batch = padded(responses)
    moved = {
        f.name: getattr(batch, f.name) if f.name == "row_ids" else getattr(batch, f.name).cuda()
        for f in fields(batch)
    }
    return TokenBatch(**moved)


def scores(model: TinyTransformer, lay_out: object) -> tuple[torch.Tensor, InfluenceTracer]:
    tracer = InfluenceTracer(model, CONFIG)
    rows = capture_and_pop(tracer, model, [RESPONSES[:3], RESPONSES[3:]], lay_out)  # type: ignore[arg-type]
    assert all(row.scores.device.type == "cpu" for row in rows)
    return torch.cat([row.scores for row in rows]).double(), tracer


def pop(tracer: InfluenceTracer) -> list[RowScores]:
    return tracer.pop_rows([r.group for r in RESPONSES], [r.contrast for r in RESPONSES])


@pytest.mark.parametrize(
    ("dtype", "correlation"),
    [(torch.float64, 1 - 1e-10), (torch.float32, 1 - 1e-5), (torch.bfloat16, 0.97)],
)
def test_scores_are_those_of_the_cpu(dtype: torch.dtype, correlation: float) -> None:
    exact, _ = scores(TinyTransformer(), padded)
    found, tracer = scores(TinyTransformer(dtype=dtype).cuda(), on_gpu)
    assert float(torch.corrcoef(torch.stack([exact, found]))[0, 1]) >= correlation
    timing = tracer.pop_timing()
    assert timing["capture"] > 0
    assert math.isclose(sum(timing[p] for p in (*PHASES, "other")), timing["pop_rows"], rel_tol=1e-9)


def test_gradients_are_bitwise_equal_with_and_without_tracing() -> None:
    def gradients(*, traced: bool) -> list[torch.Tensor]:
        model = TinyTransformer(dtype=torch.bfloat16).cuda()
        batch = on_gpu(RESPONSES)
        if traced:
            with InfluenceTracer(model, CONFIG).capture(batch.row_ids):
                objective(model, batch).backward()
        else:
            objective(model, batch).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        pairs = zip(gradients(traced=False), gradients(traced=True), strict=True)
        assert all(torch.equal(plain, traced) for plain, traced in pairs)
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_objective_can_share_the_forward_and_nothing_waits() -> None:
    model = TinyTransformer(dtype=torch.bfloat16).cuda()
    tracer = InfluenceTracer(model, CONFIG)
    batches = [on_gpu(RESPONSES[:3]), on_gpu(RESPONSES[3:])]
    for is_first in (True, False):  # what is made once, kernels and signs, may wait
        model.zero_grad()
        torch.cuda.set_sync_debug_mode("default" if is_first else "error")
        try:
            for batch in batches:
                with tracer.capture(batch.row_ids) as micro_batch:
                    terms = token_terms(model, batch)
                    micro_batch.backward(terms.sum(), retain_graph=True)
                terms.square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        rows = pop(tracer)
    assert all(row.scored for row in rows)
    expected, _ = scores(TinyTransformer(dtype=torch.bfloat16).cuda(), on_gpu)
    found = torch.cat([row.scores for row in rows]).double()
    assert float(torch.corrcoef(torch.stack([expected, found]))[0, 1]) > 0.999


def test_popping_rows_waits_for_the_solve_and_for_the_scores_alone() -> None:
    model = TinyTransformer(dtype=torch.bfloat16).cuda()
    tracer = InfluenceTracer(model, CONFIG)
    for _ in range(2):
        for part in (RESPONSES[3:], RESPONSES[:3]):
            capture(tracer, model, on_gpu(part))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                rows = pop(tracer)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert len(rows) == len(RESPONSES)
    # Of the solve's numbers and of the scores the host awaits the copies, by events, and never the stream.
    assert not [w for w in seen if "synchronizing" in str(w.message)]
