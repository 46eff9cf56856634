"""Invariants of whole updates: what scores are when, and what is counted, timed and warned of."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from influence import InfluenceTracer, TracerConfig
from influence.config import InfluenceWarning
from influence.modules import find_modules
from influence.score import RowScores
from influence.timing import PARTS, PHASES
from tests.influence.brute_force import relative_error
from tests.influence.tiny_model import (
    Response,
    TinyTransformer,
    TokenBatch,
    make_responses,
    packed,
    padded,
)
from tests.influence.tracing import capture, capture_and_pop, trace

CONFIG = TracerConfig(projection_dim_factor=2)
RESPONSES = make_responses(num_responses=8, num_groups=2)
MODEL = TinyTransformer()
EXPECTED = trace(MODEL, [RESPONSES], CONFIG)


def assert_same(found: dict[int, RowScores], expected: dict[int, RowScores] = EXPECTED) -> None:
    assert list(found) == list(expected)
    for row_id, row in expected.items():
        assert relative_error(found[row_id].scores, row.scores) < 1e-11
        assert found[row_id].total == pytest.approx(row.total, rel=1e-11)
        assert found[row_id].scored == row.scored


@pytest.mark.parametrize("hessian", ["response", "identity", "token"])
@pytest.mark.parametrize("exclude_self", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_scores_of_a_response_add_up_to_its_total(
    hessian: str, exclude_self: bool, dtype: torch.dtype
) -> None:
    config = TracerConfig(hessian=hessian, exclude_self=exclude_self, projection_dim_factor=2)
    rows = trace(TinyTransformer(dtype=dtype), [RESPONSES], config)
    scale = max(abs(row.total) for row in rows.values())
    for row in rows.values():
        # bfloat16 rounds what is stored, not what is added up: G comes from the stored factors.
        precision = 1e-12 if dtype == torch.float64 else 1e-5
        assert float(row.scores.double().sum()) == pytest.approx(row.total, abs=precision * scale)


def test_a_response_of_n_tokens_has_n_scores_at_positions_0_to_n() -> None:
    for response in RESPONSES:
        row = EXPECTED[response.row_id]
        assert row.scores.shape == (response.num_scores,)
        assert row.positions.tolist() == list(range(response.num_scores))
        assert row.scores.abs().min() > 0


@pytest.mark.parametrize(
    "lay_out",
    [packed, lambda responses: padded(responses, extra=5)],
    ids=["packed", "more padding"],
)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_layout_and_micro_batch_size_do_not_matter(
    size: int, lay_out: Callable[[list[Response]], TokenBatch]
) -> None:
    micro_batches = [RESPONSES[start : start + size] for start in range(0, len(RESPONSES), size)]
    assert_same(trace(MODEL, micro_batches, CONFIG, lay_out))


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(len(RESPONSES))), st.integers(1, 7))
def test_the_order_of_responses_does_not_matter(order: list[int], cut: int) -> None:
    shuffled = [RESPONSES[i] for i in order]
    assert_same(trace(MODEL, [shuffled[:cut], shuffled[cut:]], CONFIG))


def test_other_row_ids_permute_the_rows() -> None:
    renamed = [replace(r, row_id=100 - r.row_id) for r in RESPONSES]
    found = trace(MODEL, [renamed], CONFIG)
    assert list(found) == sorted(found)
    assert_same({r.row_id: found[100 - r.row_id] for r in RESPONSES})


def test_group_ids_only_need_to_tell_groups_apart() -> None:
    assert_same(trace(MODEL, [[replace(r, group=-7 * r.group) for r in RESPONSES]], CONFIG))


def test_groups_do_not_touch_each_other() -> None:
    first = [r for r in RESPONSES if r.group == RESPONSES[0].group]
    alone = trace(MODEL, [first], CONFIG)
    assert_same(alone, {r.row_id: EXPECTED[r.row_id] for r in first})


def test_scope_batch_is_one_group() -> None:
    batch_scope = replace(CONFIG, scope="batch")
    assert_same(
        trace(MODEL, [RESPONSES], batch_scope),
        trace(MODEL, [[replace(r, group=0) for r in RESPONSES]], CONFIG),
    )


def test_retries_are_bitwise_equal() -> None:
    again = trace(copy.deepcopy(MODEL), [RESPONSES], CONFIG)
    assert all(torch.equal(again[i].scores, EXPECTED[i].scores) for i in EXPECTED)


def test_contrast_scales_scores() -> None:
    doubled = trace(MODEL, [[replace(r, contrast=2 * r.contrast) for r in RESPONSES]], CONFIG)
    assert all(relative_error(doubled[i].scores, 2 * EXPECTED[i].scores) < 1e-11 for i in EXPECTED)


def test_gradients_from_another_objective_scale_do_not_change_relative_damping() -> None:
    # u scales by 3, so K and lambda by 9 and the scores not at all: the loss aggregation does not matter.
    assert_same(trace(MODEL, [[replace(r, advantage=3 * r.advantage) for r in RESPONSES]], CONFIG))


class TestCapping:
    CONFIG = replace(CONFIG, max_tokens_per_response=3)

    def test_rows_have_the_selected_positions_only(self) -> None:
        rows = trace(MODEL, [RESPONSES], self.CONFIG)
        for response in RESPONSES:
            n = response.num_scores
            kept = list(range(n)) if n <= 3 else [(2 * i + 1) * n // 6 for i in range(3)]
            assert rows[response.row_id].positions.tolist() == kept

    def test_gradients_are_those_of_the_selected_tokens(self) -> None:
        # The same as marking only these tokens in row_ids.
        batch = padded(RESPONSES)
        row_ids = torch.full_like(batch.row_ids, -1)
        for line, response in enumerate(RESPONSES):
            marked = (batch.row_ids[line] >= 0).nonzero().flatten()
            n = response.num_scores
            kept = marked if n <= 3 else marked[[(2 * i + 1) * n // 6 for i in range(3)]]
            row_ids[line, kept] = response.row_id
        marked_only = trace(MODEL, [RESPONSES], CONFIG, lambda _: replace(batch, row_ids=row_ids))
        assert_same(trace(MODEL, [RESPONSES], self.CONFIG), marked_only)

    def test_a_cap_above_every_length_changes_nothing(self) -> None:
        assert_same(trace(MODEL, [RESPONSES], replace(CONFIG, max_tokens_per_response=100)))


class TestGroupsWithoutContrast:
    CONFIG = TracerConfig(projection_dim_factor=2, contrast="accepted_minus_rejected", objective="log_prob")

    def rows(
        self, contrast: Callable[[Response], float], config: TracerConfig
    ) -> tuple[list[RowScores], dict[str, int]]:
        tracer = InfluenceTracer(MODEL, config)
        rows = capture_and_pop(tracer, MODEL, [[replace(r, contrast=contrast(r)) for r in RESPONSES]])
        tracer.remove()
        return rows, tracer.debug_stats()

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_one_sign_is_emitted_as_zeros_and_counted(self, sign: float) -> None:
        one_signed = RESPONSES[0].group
        rows, stats = self.rows(lambda r: sign if r.group == one_signed else r.contrast, self.CONFIG)
        for row, response in zip(rows, RESPONSES, strict=True):
            assert row.scored == (response.group != one_signed)
            assert bool((row.scores == 0).all()) == (response.group == one_signed)
            assert row.scores.shape == (response.num_scores,)
            assert (row.total == 0) == (response.group == one_signed)
        assert (stats["groups"], stats["skipped_groups"]) == (2, 1)

    def test_one_sign_is_a_direction_like_any_other_under_other_contrasts(self) -> None:
        for contrast in ("none", "advantage"):
            rows, stats = self.rows(lambda r: 1.0, replace(self.CONFIG, contrast=contrast))
            assert all(row.scored for row in rows)
            assert stats["skipped_groups"] == 0

    def test_zero_contrast_has_no_direction(self) -> None:
        rows, stats = self.rows(lambda r: 0.0, replace(self.CONFIG, contrast="advantage"))
        assert not any(row.scored for row in rows)
        assert stats["skipped_groups"] == 2

    def test_a_single_response_cannot_be_left_out_of_itself(self) -> None:
        single = [replace(RESPONSES[0], contrast=1.0)]
        for exclude_self in (True, False):
            rows = trace(MODEL, [single], replace(CONFIG, exclude_self=exclude_self))
            assert rows[0].scored is not exclude_self

    def test_a_row_with_zero_gradient_scores_zero_and_spoils_nothing(self) -> None:
        silent = [replace(r, advantage=0.0) if r.row_id == 0 else r for r in RESPONSES]
        rows = trace(MODEL, [silent], CONFIG)
        assert torch.equal(rows[0].scores, torch.zeros_like(rows[0].scores))
        assert all(bool(row.scores.isfinite().all()) for row in rows.values())


class _PoisonGradient(torch.autograd.Function):
    """Passes values through, and makes the gradient of one line NaN."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, line: int) -> Tensor:
        ctx.line = line
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        gradient[ctx.line, 1] = torch.nan
        return gradient, None


class TestNonFinite:
    NAME = "layers.0.self_attn.q_proj"

    def test_it_drops_the_module_for_that_row_and_names_it(self) -> None:
        model, spoiled = copy.deepcopy(MODEL), 2
        tracer = InfluenceTracer(model, CONFIG)
        # No other traced layer lies below q_proj of the first layer, so the NaN stays there.
        poison = model.get_submodule(self.NAME).register_forward_hook(
            lambda module, args, output: _PoisonGradient.apply(output, spoiled)
        )
        with pytest.warns(InfluenceWarning, match=rf"not finite.*{self.NAME} \(1\)"):
            rows = capture_and_pop(tracer, model, [RESPONSES])
        assert tracer.nonfinite_modules() == {self.NAME: 1}
        assert tracer.debug_stats()["nonfinite_drops"] == 1
        poison.remove()
        tracer.remove()

        others = tuple(name for name in InfluenceTracer(MODEL, CONFIG).module_names if name != self.NAME)
        without_module = trace(MODEL, [RESPONSES], replace(CONFIG, modules=others))
        rest = [r for r in RESPONSES if r.row_id != spoiled]
        without_row = trace(MODEL, [rest], replace(CONFIG, modules=(self.NAME,)))
        for row in rows:
            expected = without_module[row.row_id].scores
            if row.row_id != spoiled:
                expected = expected + without_row[row.row_id].scores
            assert row.scored
            assert relative_error(row.scores, expected) < 1e-11

    @pytest.mark.filterwarnings("ignore:values that are not finite")
    @pytest.mark.parametrize(
        ("hessian", "size", "num_dropped"),
        [
            ("response", 1e-40, 4),
            ("response", 1e-36, 4),
            ("response", 1e-30, 0),
            ("response", 1e30, 0),
            ("response", 1e36, 4),
            ("token", 1e-40, 4),
            ("token", 1e-30, 0),
            ("token", 1e30, 0),
            ("token", 1e36, 4),
            ("identity", 1e-40, 0),
            ("identity", 1e14, 0),
            ("identity", 1e20, 4),
        ],
    )
    def test_what_would_overflow_is_counted_and_not_scored(
        self, hessian: str, size: float, num_dropped: int
    ) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4))
        tracer = InfluenceTracer(
            model, TracerConfig(modules=("0",), projection_dim_factor=2, hessian=hessian)
        )
        with tracer.capture(torch.arange(4).repeat_interleave(5)[None]):
            (model(torch.randn(1, 20, 6)).square().sum() * size).backward()
        rows = tracer.pop_rows([0] * 4, [1.0, -1.0, 1.0, -1.0])
        assert tracer.debug_stats()["nonfinite_drops"] == num_dropped
        assert [row.scored for row in rows] == [num_dropped == 0] * 4
        for row in rows:
            assert row.scores.isfinite().all()
            assert float(row.scores.double().sum()) == pytest.approx(row.total, rel=1e-3, abs=1e-37)

    @pytest.mark.filterwarnings("ignore:values that are not finite")
    @pytest.mark.parametrize("hessian", ["response", "identity", "token"])
    def test_accepted_rows_alone_are_not_scored_where_the_rejected_are_lost(self, hessian: str) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4))
        config = TracerConfig(
            objective="log_prob", contrast="accepted_minus_rejected", modules=("0",), hessian=hessian
        )
        tracer, inputs = InfluenceTracer(model, config), torch.randn(1, 20, 6)
        inputs[0, 5:10] = torch.nan
        with tracer.capture(torch.arange(4).repeat_interleave(5)[None]):
            model(inputs).square().sum().backward()
        rows = tracer.pop_rows([0] * 4, [1.0, -1.0, 1.0, 1.0])
        assert tracer.debug_stats()["nonfinite_drops"] == 1
        for row in rows:
            assert (row.scored, row.total) == (False, 0.0)
            assert not row.scores.any()

    def test_a_skipped_group_is_zero_and_not_nan(self) -> None:
        model = copy.deepcopy(MODEL)
        model.get_submodule(self.NAME).register_forward_hook(
            lambda module, args, output: _PoisonGradient.apply(output, 2)
        )
        config = replace(CONFIG, contrast="accepted_minus_rejected", objective="log_prob")
        tracer = InfluenceTracer(model, config)
        for row in capture_and_pop(tracer, model, [[replace(r, contrast=1.0) for r in RESPONSES]]):
            assert not row.scored
            assert torch.equal(row.scores, torch.zeros_like(row.scores))

    @pytest.mark.filterwarnings("ignore:values that are not finite")
    def test_a_row_without_any_finite_gradient_counts_as_absent(self) -> None:
        model, spoiled = copy.deepcopy(MODEL), RESPONSES[3]
        unused = 0
        tokens = (*spoiled.tokens[:-2], unused, spoiled.tokens[-1])
        others = [replace(r, tokens=tuple(t or 1 for t in r.tokens)) for r in RESPONSES if r != spoiled]
        expected = trace(model, [others], CONFIG)
        with torch.no_grad():
            model.embed_tokens.weight[unused] = torch.inf
        bad = replace(
            spoiled,
            tokens=tuple(t or 1 for t in tokens[: spoiled.prompt_length]) + tokens[spoiled.prompt_length :],
        )
        found = trace(model, [sorted([*others, bad], key=lambda r: r.row_id)], CONFIG)
        assert not found[spoiled.row_id].scored
        assert torch.equal(found[spoiled.row_id].scores, torch.zeros(bad.num_scores).double())
        del found[spoiled.row_id]
        assert_same(found, expected)


class TestCounters:
    def test_they_count_rows_tokens_and_groups(self) -> None:
        tracer = InfluenceTracer(MODEL, CONFIG)
        capture_and_pop(tracer, MODEL, [RESPONSES[:3], RESPONSES[3:]])
        stats = tracer.debug_stats()
        tracer.remove()
        assert stats == {
            "modules": 14,
            "micro_batches": 2,
            "captured_tokens": sum(r.num_scores for r in RESPONSES),
            "rows_emitted": 8,
            "groups": 2,
            "skipped_groups": 0,
            "interpolated_groups": 0,
            "double_sign_groups": 0,
            "solve_floors": 0,
            "nonfinite_drops": 0,
        }

    def test_resetting_them_leaves_the_timings(self) -> None:
        # The implementation of the reference run zeroed its timings together with its counters.
        tracer = InfluenceTracer(MODEL, CONFIG)
        capture_and_pop(tracer, MODEL, [RESPONSES])
        assert tracer.debug_stats(reset=True)["rows_emitted"] == 8
        assert tracer.debug_stats()["rows_emitted"] == 0
        assert tracer.debug_stats()["modules"] == 14
        timing = tracer.pop_timing()
        tracer.remove()
        assert all(timing[phase] > 0 for phase in (*PHASES, "pop_rows", "capture"))

    def test_reading_timings_leaves_the_counters(self) -> None:
        tracer = InfluenceTracer(MODEL, CONFIG)
        capture_and_pop(tracer, MODEL, [RESPONSES])
        tracer.pop_timing()
        assert tracer.debug_stats()["rows_emitted"] == 8
        assert set(tracer.pop_timing().values()) == {0.0}
        tracer.remove()


def test_timings_add_up_exactly_and_over_updates() -> None:
    tracer = InfluenceTracer(MODEL, CONFIG)
    for _ in range(2):
        capture_and_pop(tracer, MODEL, [RESPONSES])
    timing = tracer.pop_timing()
    tracer.remove()
    assert list(timing) == [*PHASES, "other", "pop_rows", "capture", *PARTS]
    assert timing["pop_rows"] == sum(timing[phase] for phase in (*PHASES, "other"))
    assert all(math.isfinite(seconds) and seconds >= 0 for seconds in timing.values())


def test_no_timing_unless_asked() -> None:
    tracer = InfluenceTracer(MODEL, replace(CONFIG, profile_timing=False))
    capture_and_pop(tracer, MODEL, [RESPONSES])
    tracer.remove()
    assert tracer.pop_timing() == {}


class TestArguments:
    @pytest.mark.parametrize(
        ("groups", "contrast", "message"),
        [
            ([0] * 7, [1.0] * 8, "groups has 7 entries where 8 rows"),
            ([0] * 8, [1.0] * 9, "contrast has 9 entries where 8 rows"),
            ([0] * 8, [1.0] * 7 + [math.nan], "contrast of row 7 is nan"),
            ([0] * 7 + [0.5], [1.0] * 8, r"group of row 7 is 0\.5; it must be a whole number"),
            ([0, 1.0] * 4, [1.0] * 8, r"group of row 1 is 1\.0"),
            (torch.zeros(8), [1.0] * 8, r"group of row 0 is 0\.0"),
            (torch.zeros(8, dtype=torch.bool), [1.0] * 8, "group of row 0 is False"),
            (torch.zeros(8, 1, dtype=torch.int64), [1.0] * 8, r"group of row 0 is \[0\]"),
            (["0"] * 8, [1.0] * 8, "group of row 0 is '0'"),
            ([0, True] * 4, [1.0] * 8, "group of row 1 is True"),
            ([0] * 7 + [2**63], [1.0] * 8, "group of row 7 is 9223372036854775808; .* 64 bits"),
            (5, [1.0] * 8, "groups is 5; give a sequence"),
            (torch.tensor(5), [1.0] * 8, r"groups is tensor\(5\); give a sequence"),
            (dict.fromkeys(range(8), 0), [1.0] * 8, "groups is {0: 0, .*; give a sequence"),
            ([0] * 8, [None] * 8, "contrast of row 0 is None; it must be a finite number"),
            ([0] * 8, ["1"] * 8, "contrast of row 0 is '1'"),
            ([0] * 8, [True] * 8, "contrast of row 0 is True"),
            ([0] * 8, [1j] * 8, "contrast of row 0 is 1j"),
            ([0] * 8, [10**400] * 8, "contrast of row 0 is 1000.*0000; it must be a finite"),
            ([0] * 8, [torch.ones(2)] * 8, "contrast of row 0 is tensor"),
            ([0] * 8, None, "contrast is None; give a sequence"),
        ],
    )
    def test_wrong_arguments_keep_what_was_captured(self, groups: Any, contrast: Any, message: str) -> None:
        tracer = InfluenceTracer(MODEL, CONFIG)
        capture(tracer, MODEL, padded(RESPONSES))
        with pytest.raises(ValueError, match=message):
            tracer.pop_rows(groups, contrast)
        rows = tracer.pop_rows([r.group for r in RESPONSES], [r.contrast for r in RESPONSES])
        tracer.remove()
        assert_same({row.row_id: row for row in rows})

    @pytest.mark.parametrize("kind", [torch.tensor, np.asarray, iter, lambda v: list(torch.tensor(v))])
    def test_tensors_and_arrays_are_taken_as_well(self, kind: Callable[[list[float]], Any]) -> None:
        tracer = InfluenceTracer(MODEL, CONFIG)
        capture(tracer, MODEL, padded(RESPONSES))
        rows = tracer.pop_rows(kind([r.group for r in RESPONSES]), kind([r.contrast for r in RESPONSES]))
        tracer.remove()
        assert_same({row.row_id: row for row in rows})

    def test_popping_forgets(self) -> None:
        tracer = InfluenceTracer(MODEL, CONFIG)
        capture_and_pop(tracer, MODEL, [RESPONSES])
        assert tracer.pop_rows([], []) == []
        assert_same({row.row_id: row for row in capture_and_pop(tracer, MODEL, [RESPONSES])})
        tracer.remove()


class TestSurprises:
    REFERENCE = TracerConfig(
        objective="log_prob_advantage",
        contrast="accepted_minus_rejected",
        hessian="inverse",
        damping_mode="trace_over_dim",
        exclude_self=False,
        projection_dim_factor=1,
    )

    def test_the_double_sign_is_told_and_counted(self) -> None:
        with pytest.warns(InfluenceWarning, match="sign of the advantage twice"):
            tracer = InfluenceTracer(MODEL, replace(self.REFERENCE, exclude_self=True))
        capture_and_pop(tracer, MODEL, [RESPONSES])
        assert tracer.debug_stats()["double_sign_groups"] == 2
        tracer.remove()

    @pytest.mark.filterwarnings("ignore:.*advantage twice")
    def test_with_more_dimensions_than_responses_totals_interpolate(self) -> None:
        model = TinyTransformer(width=32, hidden=48, kv_width=16)
        tracer = InfluenceTracer(model, self.REFERENCE)
        with pytest.warns(
            InfluenceWarning, match=r"in 2 of 2 groups .* \(7\.99 effective degrees of freedom for 8"
        ):
            rows = capture_and_pop(tracer, model, [RESPONSES])
        stats = tracer.debug_stats()
        tracer.remove()
        assert stats["interpolated_groups"] == 2
        for row, response in zip(rows, RESPONSES, strict=True):
            assert row.total / stats["modules"] == pytest.approx(response.contrast, abs=0.05)

    @pytest.mark.filterwarnings("error")
    def test_a_warning_that_is_an_error_loses_no_rows_and_counts_nothing(self) -> None:
        config = replace(self.REFERENCE, contrast="none")
        model = TinyTransformer(width=32, hidden=48, kv_width=16)
        tracer = InfluenceTracer(model, config)
        arguments = [r.group for r in RESPONSES], [r.contrast for r in RESPONSES]
        capture(tracer, model, padded(RESPONSES))
        with pytest.raises(InfluenceWarning, match="effective degrees of freedom"):
            tracer.pop_rows(*arguments)
        assert tracer.debug_stats()["rows_emitted"] == tracer.debug_stats()["interpolated_groups"] == 0
        # It was told, and is not told again.
        rows = tracer.pop_rows(*arguments)
        assert [row.row_id for row in rows] == [r.row_id for r in RESPONSES]
        assert tracer.debug_stats()["rows_emitted"] == 8
        assert tracer.pop_rows([], []) == []

    @pytest.mark.filterwarnings("error")
    def test_a_setting_whose_warning_is_an_error_leaves_no_hooks(self) -> None:
        model = TinyTransformer()
        with pytest.raises(InfluenceWarning, match="sign of the advantage twice"):
            InfluenceTracer(model, self.REFERENCE)
        assert not any(module._forward_hooks for module in model.modules())

    @pytest.mark.parametrize(
        "change",
        [{"damping_mode": "trace_over_responses"}, {"exclude_self": True}, {"hessian": "identity"}],
        ids=str,
    )
    def test_the_ways_out_do_not_interpolate(self, change: dict[str, object]) -> None:
        model = TinyTransformer(width=32, hidden=48, kv_width=16)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=r".*effective degrees of freedom")
            warnings.filterwarnings("ignore", message=".*advantage twice")
            tracer = InfluenceTracer(model, replace(self.REFERENCE, **change))
            capture_and_pop(tracer, model, [RESPONSES])
        assert tracer.debug_stats()["interpolated_groups"] == 0
        tracer.remove()

    NARROW = TracerConfig(projection_dim_factor=1, max_hessian_dim=64)

    def test_narrower_projections_than_asked_for_are_told(self) -> None:
        with pytest.warns(InfluenceWarning, match=r"6 modules, such as layers\.0\.mlp\.gate_proj"):
            InfluenceTracer(MODEL, replace(self.NARROW, hessian="token")).remove()

    @pytest.mark.parametrize("hessian", ["response", "identity"])
    def test_widths_are_kept_where_no_matrix_over_dimensions_is_formed(self, hessian: str) -> None:
        modules, narrowed = find_modules(MODEL, replace(self.NARROW, hessian=hessian))
        assert narrowed == []
        assert all(m.shape == tuple(m.module.weight.shape) for m in modules)

    def test_ordinary_settings_warn_of_nothing(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trace(MODEL, [RESPONSES], TracerConfig())
