"""What ``pop_rows`` costs at the reference run's sizes, beside one read of what was captured.

    python benchmarks/influence_pop_rows.py [--json FILE] [--factors 256 128 64 32] [--repeats 41] [--tiny]

96 responses to 6 prompts, 733,870 tokens, the 196 linear layers of a 1.5B Qwen2; the captured factors are
random numbers in bfloat16, in 48 micro-batches. ``pop_rows`` is timed by the clock from an idle GPU until the
scores are on the CPU; its phases by the tracer's own events. The floor is the time to read as many bytes at
the rate of a sum over 8.6 GB in the same run.

The scores of two rows are compared with float64 straight from the definition: on the CPU for factors from 128
on, with the GPU's float64 units below, where there is more to compute.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from influence_measure import (
    interleaved,
    machine,
    publish,
    ratio,
    read_bytes_per_second,
    require_gpu,
    synchronize,
    table,
    wall_seconds,
)
from influence_shapes import REFERENCE, TINY, Shapes, build_model
from influence_synthetic import Reference, captured_rows, layout_of, put
from torch import nn
from torch.profiler import ProfilerActivity, profile

from influence import InfluenceTracer, MemoryEstimate, TracerConfig, estimate_memory, kernels
from influence.micro_batch import MicroBatch
from influence.score import RowScores

PHASES = ("grad_staging", "hessian_solve", "token_scoring", "score_aggregation", "other")
INSIDE = {"all_gather": "grad_staging", "copy_to_host": "score_aggregation"}
CHECKED_ROWS = 2


def measure(
    shapes: Shapes,
    model: nn.Module,
    factor: int,
    device: torch.device,
    repeats: int,
    bytes_per_second: float,
) -> dict[str, Any]:
    config = TracerConfig(
        objective="log_prob", contrast="accepted_minus_rejected", projection_dim_factor=factor
    )
    tracer = InfluenceTracer(model, config)
    untimed = InfluenceTracer(
        model,
        TracerConfig(
            objective="log_prob",
            contrast="accepted_minus_rejected",
            projection_dim_factor=factor,
            profile_timing=False,
        ),
    )
    batches = captured_rows(layout_of(tracer), shapes.row_lengths(), range(shapes.rows), device)
    groups, contrast = shapes.groups_and_contrast()
    phases: list[dict[str, float]] = []

    def fill() -> None:
        put(tracer, batches)
        put(untimed, batches)
        phases.append(tracer.pop_timing())

    fill()
    started = time.perf_counter()
    scored = tracer.pop_rows(groups, contrast)
    synchronize(device)
    first_s = time.perf_counter() - started
    fill()
    phases.clear()
    variants = {
        "pop_rows": lambda: tracer.pop_rows(groups, contrast),
        "profile_timing off": lambda: untimed.pop_rows(groups, contrast),
    }
    warm_ups = 3
    times = interleaved(variants, device, repeats=repeats, warm_ups=warm_ups, tidy=fill)
    recorded = [taken for taken in phases if taken.get("pop_rows")][warm_ups:]
    captured_bytes = sum(t.numel() * t.element_size() for batch in batches for t in batch.factors)
    gradients_s = statistics.median(
        wall_seconds(lambda: _recompute_gradients(tracer, batches), device) for _ in range(5)
    )
    held = captured_bytes + sum(b.gradients.numel() * b.gradients.element_size() for b in batches)
    estimate = estimate_memory(model, config, shapes.tokens, rows=shapes.rows)
    result = {
        "factor": factor,
        "numbers_per_token": layout_of(tracer).num_factors,
        "captured_bytes": captured_bytes,
        "held_bytes_per_token": held / shapes.tokens,
        "estimated_bytes_per_token": _held_per_token(estimate, shapes.tokens),
        "times": {name: taken.to_json() for name, taken in times.items()},
        "first_call_s": first_s,
        "phases_s": {
            name: statistics.median(taken.get(name, 0.0) for taken in recorded)
            for name in (*PHASES, *INSIDE, "pop_rows")
        },
        "profile_timing_on_over_off": ratio(times["pop_rows"], times["profile_timing off"]).to_json(),
        "floor_s": captured_bytes / bytes_per_second,
        "times_floor": times["pop_rows"].median / (captured_bytes / bytes_per_second),
        "response_gradients_s": gradients_s,
        "errors": _errors(tracer, batches, groups, contrast, scored, device),
    }
    if device.type == "cuda":
        put(tracer, batches)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            tracer.pop_rows(groups, contrast)
            torch.cuda.synchronize()
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
        result["kernels"] = [[e.key[:90], e.count, e.self_device_time_total / 1e6] for e in events[:25]]
        result["gpu_busy_s"] = sum(event.self_device_time_total for event in events) / 1e6
        result["launches"] = sum(event.count for event in events if event.self_device_time_total)
    tracer.remove()
    untimed.remove()
    return result


def _held_per_token(estimate: MemoryEstimate, tokens: int) -> float:
    return (estimate.factors_bytes + estimate.gradients_bytes) / tokens


def _recompute_gradients(tracer: InfluenceTracer, batches: Sequence[MicroBatch]) -> None:
    """What closing the micro-batches costs, which the capture pays."""
    for batch in batches:
        out = torch.empty_like(batch.gradients)
        kernels.response_gradients(
            batch.factors[0], batch.selection.row_slots.tolist(), layout_of(tracer), out
        )


def _errors(
    tracer: InfluenceTracer,
    batches: Sequence[MicroBatch],
    groups: Sequence[int],
    contrast: Sequence[float],
    scored: Sequence[RowScores],
    device: torch.device,
) -> list[float]:
    """Relative errors of the first rows of the last group, against the definition."""
    rows = [row for row, group in enumerate(groups) if group == groups[-1]]
    place = torch.device("cpu") if tracer.config.projection_dim_factor >= 128 else device
    reference = Reference.of_group(
        layout_of(tracer), batches, {row: contrast[row] for row in rows}, tracer.config.damping, place
    )
    expected = reference.scores(rows[:CHECKED_ROWS])
    return [
        float((scored[row].scores.double() - right).norm() / right.norm()) for row, right in expected.items()
    ]


def _phase(name: str, result: dict[str, Any]) -> str:
    return f"{result['phases_s'][name] * 1e3:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--factors", type=int, nargs="+", default=None)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it on a CPU")
    arguments = parser.parse_args()
    require_gpu(parser, tiny=arguments.tiny)

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    shapes = TINY if arguments.tiny else REFERENCE
    model = build_model(shapes, device)
    chosen = arguments.factors or ([32, 16] if arguments.tiny else [256, 128, 64, 32])
    bytes_per_second = read_bytes_per_second(device)
    measured = []
    for factor in chosen:
        measured.append(measure(shapes, model, factor, device, arguments.repeats, bytes_per_second))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        result = measured[-1]
        print(f"factor {factor}: {result['times']['pop_rows']['median_s'] * 1e3:.2f} ms", flush=True)

    def row(name: str, show: Callable[[dict[str, Any]], str]) -> list[object]:
        return [name, *(show(result) for result in measured)]

    rows = [
        row("**pop_rows, ms**", lambda r: f"**{r['times']['pop_rows']['median_s'] * 1e3:.2f}**"),
        row("± ms", lambda r: f"{r['times']['pop_rows']['spread_s'] * 1e3:.2f}"),
        *(row(name, partial(_phase, name)) for name in PHASES),
        row("pop_rows by its own events", partial(_phase, "pop_rows")),
        *(row(f"in {phase}, {name}", partial(_phase, name)) for name, phase in INSIDE.items()),
        row("captured, GB", lambda r: f"{r['captured_bytes'] / 1e9:.2f}"),
        row(
            f"floor: one read of it at {bytes_per_second / 1e12:.2f} TB/s, ms",
            lambda r: f"{r['floor_s'] * 1e3:.2f}",
        ),
        row("x floor (goal: 3; 4 ms at 256)", lambda r: f"{r['times_floor']:.2f}"),
        row(
            "profile_timing on / off (goal: 1.01)",
            lambda r: f"{r['profile_timing_on_over_off']['median_s']:.3f}",
        ),
        row("±", lambda r: f"{r['profile_timing_on_over_off']['spread_s']:.3f}"),
        row("relative error to float64", lambda r: f"{max(r['errors']):.1e}"),
        row("bytes a token, held", lambda r: f"{r['held_bytes_per_token']:,.0f}"),
        row("bytes a token, estimated", lambda r: f"{r['estimated_bytes_per_token']:,.0f}"),
        row("response_gradients (of the capture), ms", lambda r: f"{r['response_gradients_s'] * 1e3:.2f}"),
        row("first call (compiles kernels), s", lambda r: f"{r['first_call_s']:.2f}"),
    ]
    headings = [f"{shapes.tokens:,} tokens", *(f"factor {result['factor']}" for result in measured)]
    tables = [table(headings, rows)]
    if "kernels" in measured[0]:
        result = measured[0]
        lines = [[key, count, f"{seconds * 1e6:.0f}"] for key, count, seconds in result["kernels"][:16]]
        lines.append(["all", result["launches"], f"{result['gpu_busy_s'] * 1e6:.0f}"])
        tables.append(table([f"kernels at factor {result['factor']}", "launches", "us"], lines))
    publish(
        {"machine": machine(device), "read_bytes_per_second": bytes_per_second, "measured": measured},
        tables,
        arguments.json,
    )


if __name__ == "__main__":
    main()
