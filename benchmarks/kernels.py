"""The tracer's kernels on a GPU, at the sizes of a training step, beside one read of the same bytes.

    python benchmarks/kernels.py [--factors 256 128 64 32] [--output results.json]

The sizes: 733,870 tokens of 96 responses in 48 micro-batches of about 16,384, and the 196 linear layers of a
1.5B Qwen2.5 (28 layers, width 1,536, key and value width 256, inner width 8,960). Inputs are random. The
*floor* is the time in which ``torch.sum`` reads as many bytes, in the same run. The error is relative
(Frobenius norm), against the reference in float64 on the same bfloat16 inputs: on the responses of a
micro-batch, or on 512 tokens. At factor 32 it needs 60 GB of the GPU's memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from influence import kernels
from influence.kernels import plain
from influence.layout import FactorLayout

NUM_LAYERS, HIDDEN, KEY_VALUE, INNER = 28, 1536, 256, 8960
NUM_TOKENS, NUM_ROWS, ROWS_A_CHUNK = 733_870, 96, 2
TOKENS = 16_384
DEVICE = torch.device("cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One line of the table."""

    factor: int
    what: str
    ms: float
    """Median, on the GPU."""
    host_ms: float
    """Median time until the call returns."""
    read_bytes: int
    floor_ms: float
    error: float
    calls_a_step: int
    """In the step whose sizes these are; for capture, in a micro-batch."""


def gpu_ms(call: Callable[[], object], runs: int) -> tuple[float, float]:
    """Median milliseconds on the GPU and on the host."""
    call()
    torch.cuda.synchronize()
    events, host = [], []
    for _ in range(runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The GPU waits, so that the call's launches are queued when it comes to them.
        torch.cuda._sleep(1_500_000)
        start.record()
        before = time.perf_counter()
        call()
        host.append(1e3 * (time.perf_counter() - before))
        end.record()
        events.append((start, end))
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events), statistics.median(host)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def layout_of(factor: int) -> FactorLayout:
    def k(width: int) -> int:
        return max(1, width // factor)

    attention = [
        (k(HIDDEN), k(HIDDEN)),
        (k(KEY_VALUE), k(HIDDEN)),
        (k(KEY_VALUE), k(HIDDEN)),
        (k(HIDDEN), k(HIDDEN)),
    ]
    mlp = [(k(INNER), k(HIDDEN)), (k(INNER), k(HIDDEN)), (k(HIDDEN), k(INNER))]
    return FactorLayout.of_shapes((attention + mlp) * NUM_LAYERS)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What a training step captured."""

    memory: Tensor
    """All factors, one after another."""
    chunks: list[Tensor]
    bounds: list[list[tuple[int, int]]]
    """The rows' slots, by chunk."""


def captured_step(layout: FactorLayout) -> Step:
    rng = np.random.default_rng(0)
    lengths = rng.integers(4_000, 12_000, NUM_ROWS)
    lengths = lengths * NUM_TOKENS // lengths.sum()
    lengths[-1] += NUM_TOKENS - lengths.sum()
    all_bounds, widths = [], []
    for chunk in lengths.reshape(-1, ROWS_A_CHUNK):
        bounds, start = [], 0
        for length in chunk.tolist():
            bounds.append((start, start + length))
            start += -(-length // kernels.SLOT_ALIGNMENT) * kernels.SLOT_ALIGNMENT
        all_bounds.append(bounds)
        widths.append(start)
    memory = torch.empty(layout.num_factors * sum(widths), dtype=torch.bfloat16, device=DEVICE)
    parts = memory.split([layout.num_factors * width for width in widths])
    chunks = [part.view(layout.num_factors, -1).normal_() for part in parts]
    for chunk, bounds in zip(chunks, all_bounds, strict=True):
        ends = [first for first, _ in bounds[1:]] + [chunk.shape[1]]
        for (_, end), padded_end in zip(bounds, ends, strict=True):
            chunk[:, end:padded_end] = 0
    return Step(memory, chunks, all_bounds)


def measure_score(factor: int, layout: FactorLayout, step: Step, floor_ms: float) -> Measurement:
    weights = torch.randn(NUM_ROWS, layout.gradient_dim, device=DEVICE)
    is_finite = torch.ones(NUM_ROWS, len(layout.places), dtype=torch.bool, device=DEVICE)
    rows = [
        (chunk, first, end, chunk * ROWS_A_CHUNK + index)
        for chunk, bounds in enumerate(step.bounds)
        for index, (first, end) in enumerate(bounds)
    ]
    out = torch.empty(sum(chunk.shape[1] for chunk in step.chunks), device=DEVICE)

    def score() -> None:
        tiles = kernels.on_device(kernels.token_tiles(*zip(*rows, strict=True)), DEVICE)
        kernels.score(step.chunks, tiles, weights, is_finite, layout, out)

    ms, host_ms = gpu_ms(score, 9)
    sample = [row for row in rows if row[0] == 0]
    num_slots = step.chunks[0].shape[1]
    expected = torch.empty(num_slots, dtype=torch.float64, device=DEVICE)
    tiles = kernels.on_device(kernels.token_tiles(*zip(*sample, strict=True)), DEVICE)
    plain.score(step.chunks[:1], tiles, weights, is_finite, layout, expected)
    return Measurement(
        factor=factor,
        what="score",
        ms=ms,
        host_ms=host_ms,
        read_bytes=step.memory.numel() * 2,
        floor_ms=floor_ms,
        error=relative_error(out[:num_slots], expected),
        calls_a_step=1,
    )


def measure_response_gradients(factor: int, layout: FactorLayout, step: Step, floor_ms: float) -> Measurement:
    out = torch.empty(ROWS_A_CHUNK, layout.gradient_dim, device=DEVICE)
    turn = iter(range(10_000))

    def gradients() -> int:
        # Another micro-batch each time, or the cache would answer.
        chunk = next(turn) % len(step.chunks)
        kernels.response_gradients(step.chunks[chunk], step.bounds[chunk], layout, out)
        return chunk

    ms, host_ms = gpu_ms(gradients, 25)
    chunk = gradients()
    expected = torch.empty_like(out, dtype=torch.float64)
    plain.response_gradients(step.chunks[chunk], step.bounds[chunk], layout, expected)
    return Measurement(
        factor=factor,
        what="response_gradients",
        ms=ms,
        host_ms=host_ms,
        read_bytes=step.memory.numel() * 2 // len(step.chunks),
        floor_ms=floor_ms / len(step.chunks),
        error=relative_error(out, expected),
        calls_a_step=len(step.chunks),
    )


def measure_projections(factor: int) -> Iterable[Measurement]:
    """Inputs are shared by q, k, v and by gate, up."""
    hidden, key_value, inner = (max(1, width // factor) for width in (HIDDEN, KEY_VALUE, INNER))
    shapes = {
        ("q k v in", HIDDEN, 3 * hidden): 1,
        ("gate up in", HIDDEN, 2 * hidden): 1,
        ("o in, q o down out", HIDDEN, hidden): 4,
        ("down in, gate up out", INNER, inner): 3,
        ("k v out", KEY_VALUE, key_value): 2,
    }
    for (name, width, k), calls in shapes.items():
        yield measure_projection(factor, f"project {name} ({width:,} to {k})", width, k, calls * NUM_LAYERS)


def measure_projection(factor: int, what: str, width: int, k: int, calls: int) -> Measurement:
    copies = max(2, 400_000_000 // (TOKENS * width * 2))
    values = [torch.randn(TOKENS, width, device=DEVICE).bfloat16() for _ in range(copies)]
    signs = torch.randint(0, 2, (k, width), device=DEVICE).mul(2).sub(1).bfloat16()
    source = torch.arange(TOKENS, dtype=torch.int32, device=DEVICE)
    out = torch.empty(k, TOKENS, dtype=torch.bfloat16, device=DEVICE)
    turn = iter(range(10_000))
    ms, host_ms = gpu_ms(lambda: kernels.project(values[next(turn) % copies], signs, source, out), 25)
    floor_ms, _ = gpu_ms(lambda: values[next(turn) % copies].view(torch.float32).sum(), 25)
    kernels.project(values[0], signs, source, out)
    expected = torch.empty(k, 512, dtype=torch.float64, device=DEVICE)
    plain.project(values[0].double(), signs.double(), source[:512], expected)
    return Measurement(
        factor=factor,
        what=what,
        ms=ms,
        host_ms=host_ms,
        read_bytes=TOKENS * width * 2,
        floor_ms=floor_ms,
        error=relative_error(out[:, :512], expected),
        calls_a_step=calls,
    )


def measure(factors: Iterable[int]) -> Iterable[Measurement]:
    for factor in factors:
        yield from measure_projections(factor)
        layout = layout_of(factor)
        step = captured_step(layout)
        floor_ms, _ = gpu_ms(lambda step=step: step.memory.view(torch.float32).sum(), 9)
        yield measure_response_gradients(factor, layout, step, floor_ms)
        yield measure_score(factor, layout, step, floor_ms)
        del step
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--factors", type=int, nargs="+", default=[256, 128, 64, 32])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(machine)
    print("| factor | what | ms | host ms | GB read | TB/s | floor ms | x floor | error | calls |")
    print("|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    measurements = []
    for m in measure(arguments.factors):
        measurements.append(asdict(m))
        read_gb = m.read_bytes / 1e9
        print(
            f"| {m.factor} | {m.what} | {m.ms:.3f} | {m.host_ms:.3f} | {read_gb:.3f} "
            f"| {read_gb / m.ms:.2f} | {m.floor_ms:.3f} | {m.ms / m.floor_ms:.2f} | {m.error:.1e} "
            f"| {m.calls_a_step} |",
            flush=True,
        )
    if arguments.output:
        document = {"time": datetime.now(UTC).isoformat(), **machine, "measurements": measurements}
        arguments.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
