"""The curvature of positions, on factors made for it: against dense systems, and what does not matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from influence import InfluenceTracer, TracerConfig, token_hessian
from influence.groups import GatheredRows, plan_groups
from influence.layout import FactorLayout
from influence.token_hessian import CapturedRow, TokenFactors
from influence.weights import RowWeights, row_weights
from tests.influence.brute_force import relative_error
from tests.influence.test_distributed import RESPONSES, on_ranks, rows_of_rank
from tests.influence.tiny_model import TinyTransformer, objective, padded
from tests.influence.tracing import capture_and_pop, trace

LAYOUT = FactorLayout.of_shapes([(2, 3), (1, 2), (2, 3), (3, 2)])
GROUPS = [0, 0, 1, 0, 1, 1, 0]
CONTRAST = [1.0, -1.0, 0.5, 2.0, -0.25, 1.0, -1.5]
LENGTHS = [3, 9, 1, 4, 6, 2, 5]
CONFIG = TracerConfig(hessian="token")


def draw(num_calls: int = 1) -> list[CapturedRow]:
    torch.manual_seed(0)
    return [
        CapturedRow(
            [torch.randn(LAYOUT.num_factors, n, dtype=torch.float64) for _ in range(num_calls)],
            gradient_scale=1.0 + row / 2,
        )
        for row, n in enumerate(LENGTHS)
    ]


def token_gradients(captured: CapturedRow, module: int) -> Tensor:
    """[T, D], one position after another."""
    place = LAYOUT.places[module]
    gradients = []
    for t in range(captured.factors[0].shape[1]):
        outer = sum(
            torch.outer(LAYOUT.u(part, module)[:, t], LAYOUT.v(part, module)[:, t])
            for part in captured.factors
        )
        gradients.append(outer.flatten() * place.scale * captured.gradient_scale)
    return torch.stack(gradients)


def gradients_of(captured: list[CapturedRow]) -> Tensor:
    rows = torch.zeros(len(captured), LAYOUT.gradient_dim, dtype=torch.float64)
    for n, row in enumerate(captured):
        for module, place in enumerate(LAYOUT.places):
            start = place.gradient_start
            rows[n, start : start + place.dim] = token_gradients(row, module).sum(0)
    return rows


def solved(captured: list[CapturedRow], config: TracerConfig, gradients: Tensor | None = None) -> RowWeights:
    everything = range(len(captured))
    G_ND = gradients_of(captured) if gradients is None else gradients
    rows = GatheredRows(GROUPS, CONTRAST, everything, G_ND)
    plan = plan_groups(GROUPS, CONTRAST, everything, config)
    return row_weights(rows, plan, LAYOUT, config, TokenFactors(captured))


def dense_weights(captured: list[CapturedRow], config: TracerConfig, row: int, module: int) -> Tensor:
    group = [n for n in range(len(captured)) if GROUPS[n] == GROUPS[row]]
    others = [n for n in group if not (config.exclude_self and n == row)]
    g = {n: token_gradients(captured[n], module) for n in group}
    dim = LAYOUT.places[module].dim
    damping = 0.1 * sum(float(g[n].sum(0).square().sum()) for n in group) / len(group)
    if config.damping_mode == "trace_over_dim":
        damping = 0.1 * sum(float(g[n].square().sum()) for n in group) / dim
    H = damping * torch.eye(dim, dtype=torch.float64)
    for n in others:
        for position in g[n]:
            H += torch.outer(position, position)
    d = sum((CONTRAST[n] * g[n].sum(0) for n in others), torch.zeros(dim).double())
    return torch.linalg.solve(H, d)


@pytest.mark.parametrize("num_calls", [1, 2])
@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("damping_mode", ["trace_over_responses", "trace_over_dim"])
def test_weights_are_those_of_the_dense_system(damping_mode: str, exclude_self: bool, num_calls: int) -> None:
    captured = draw(num_calls)
    config = replace(CONFIG, exclude_self=exclude_self, damping_mode=damping_mode)
    weights = solved(captured, config)
    G_ND = gradients_of(captured)
    for row in range(len(captured)):
        total = 0.0
        for module, place in enumerate(LAYOUT.places):
            part = slice(place.gradient_start, place.gradient_start + place.dim)
            expected = dense_weights(captured, config, row, module)
            assert relative_error(weights.matrices[row, part], expected * place.scale) < 1e-10
            total += float(expected @ G_ND[row, part])
        assert weights.total[row] == pytest.approx(total, rel=1e-9)
    assert weights.is_scored == [True] * len(captured)
    assert weights.num_floors == 0


@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize(
    ("matrix_bytes", "product_bytes"),
    [(1, 1), (8 * 36 * 2, 10**9), (10**9, 8 * 6 * 2 * 3)],
    ids=["one module, one token, none kept", "some kept", "stretches of few tokens"],
)
def test_batches_of_modules_and_stretches_of_tokens_do_not_matter(
    exclude_self: bool, matrix_bytes: int, product_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, exclude_self=exclude_self)
    expected = solved(draw(), config)
    monkeypatch.setattr(token_hessian, "MATRIX_BYTES", matrix_bytes)
    monkeypatch.setattr(token_hessian, "PRODUCT_BYTES", product_bytes)
    found = solved(draw(), config)
    assert relative_error(found.matrices, expected.matrices) < 1e-12
    assert found.total == pytest.approx(expected.total, rel=1e-11)


def test_a_scale_of_all_gradients_does_not_matter() -> None:
    # g scales by 3, H and lambda by 9, d by 3: weights by 1/3, which score gradients three times as large.
    captured = draw()
    larger = [replace(row, gradient_scale=3 * row.gradient_scale) for row in captured]
    assert relative_error(solved(larger, CONFIG).matrices * 3, solved(captured, CONFIG).matrices) < 1e-12


@pytest.mark.parametrize("exclude_self", [True, False])
def test_a_row_that_is_not_finite_in_a_module_is_absent_from_it(exclude_self: bool) -> None:
    config, captured, module, spoiled = replace(CONFIG, exclude_self=exclude_self), draw(), 2, 3
    bad = captured[spoiled].factors[0].clone()
    LAYOUT.u(bad, module)[:, 1] = torch.nan
    captured[spoiled] = replace(captured[spoiled], factors=[bad])
    found = solved(captured, config)
    expected_finite = torch.ones(len(captured), len(LAYOUT.places), dtype=torch.bool)
    expected_finite[spoiled, module] = False
    assert torch.equal(found.is_finite, expected_finite)
    assert found.num_dropped == [0, 0, 1, 0]
    assert found.is_scored == [True] * len(captured)

    # As if the row had no tokens there: zero factors give no gradient, and c = 0 no contrast.
    place = LAYOUT.places[module]
    part = slice(place.gradient_start, place.gradient_start + place.dim)
    group = [n for n in range(len(captured)) if GROUPS[n] == GROUPS[spoiled] and n != spoiled]
    alone = GatheredRows(
        [0] * len(group), [CONTRAST[n] for n in group], range(len(group)), gradients_of(captured)[group]
    )
    plan = plan_groups(alone.groups, alone.contrast, alone.local, config)
    without = row_weights(alone, plan, LAYOUT, config, TokenFactors([captured[n] for n in group]))
    for index, n in enumerate(group):
        assert relative_error(found.matrices[n, part], without.matrices[index, part]) < 1e-12


def test_systems_that_are_not_positive_definite_are_floored_and_counted() -> None:
    # Every position of a group points the same way, and the damping is below the rounding of H.
    captured = [CapturedRow([torch.ones(LAYOUT.num_factors, 4, dtype=torch.float64) * 1e3]) for _ in LENGTHS]
    config = replace(CONFIG, damping=1e-30, exclude_self=False)
    weights = solved(captured, config)
    assert 0 < weights.num_floors <= 2 * len(LAYOUT.places)
    assert weights.matrices.isfinite().all()


def test_without_factors_it_says_what_is_missing() -> None:
    rows = GatheredRows(GROUPS, CONTRAST, range(7), gradients_of(draw()))
    plan = plan_groups(GROUPS, CONTRAST, range(7), CONFIG)
    with pytest.raises(ValueError, match="needs the captured factors"):
        row_weights(rows, plan, LAYOUT, CONFIG)


def test_scaled_captures_score_as_the_scaled_objective_does() -> None:
    config = replace(CONFIG, projection_dim_factor=2)
    model, scale = TinyTransformer(), {r.row_id: 0.5 + r.row_id for r in RESPONSES}
    scaled = [replace(r, advantage=r.advantage * scale[r.row_id]) for r in RESPONSES]
    expected = trace(model, [scaled], config)
    tracer = InfluenceTracer(model, config)
    for responses in (RESPONSES[:3], RESPONSES[3:]):
        batch = padded(responses)
        with tracer.capture(batch.row_ids, {r.row_id: scale[r.row_id] for r in responses}):
            objective(model, batch).backward()
    rows = tracer.pop_rows([r.group for r in RESPONSES], [r.contrast for r in RESPONSES])
    tracer.remove()
    for row in rows:
        assert relative_error(row.scores, expected[row.row_id].scores) < 1e-11


# --- several ranks


def score_on(rank: int, num_ranks: int, exclude_self: bool, scope: str) -> dict[str, Any]:
    model = TinyTransformer()
    config = TracerConfig(hessian="token", exclude_self=exclude_self, scope=scope, projection_dim_factor=2)
    tracer = InfluenceTracer(model, config, process_group=dist.group.WORLD)
    rows = capture_and_pop(tracer, model, rows_of_rank(rank, num_ranks))
    return {"scores": {r.row_id: r.scores for r in rows}, "totals": {r.row_id: r.total for r in rows}}


def on_2(rank: int) -> dict[str, Any]:
    return score_on(rank, 2, True, "per_prompt")


def on_3(rank: int) -> dict[str, Any]:
    return score_on(rank, 3, False, "per_prompt")


def on_4(rank: int) -> dict[str, Any]:
    return score_on(rank, 4, True, "batch")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "num_ranks", "exclude_self", "scope"),
    [(on_2, 2, True, "per_prompt"), (on_3, 3, False, "per_prompt"), (on_4, 4, True, "batch")],
    ids=["2 ranks", "3 ranks, one without rows", "4 ranks, one group"],
)
def test_the_number_of_ranks_does_not_matter(
    job: Callable[[int], Any], num_ranks: int, exclude_self: bool, scope: str, tmp_path: Path
) -> None:
    config = TracerConfig(hessian="token", exclude_self=exclude_self, scope=scope, projection_dim_factor=2)
    expected = trace(TinyTransformer(), [RESPONSES], config)
    by_rank = on_ranks(job, num_ranks, tmp_path)
    found = {row_id: scores for result in by_rank for row_id, scores in result["scores"].items()}
    totals = {row_id: total for result in by_rank for row_id, total in result["totals"].items()}
    assert set(found) == set(expected)
    for row_id, row in expected.items():
        assert relative_error(found[row_id], row.scores) < 1e-11
        assert totals[row_id] == pytest.approx(row.total, rel=1e-10)
