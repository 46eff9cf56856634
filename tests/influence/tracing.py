"""Run the tracer over micro-batches of the tiny transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from influence import InfluenceTracer, TracerConfig
from influence.score import RowScores
from tests.influence.tiny_model import Response, TinyTransformer, TokenBatch, objective, padded


def trace(
    model: TinyTransformer,
    micro_batches: Sequence[list[Response]],
    config: TracerConfig,
    lay_out: Callable[[list[Response]], TokenBatch] = padded,
) -> dict[int, RowScores]:
    """The scores by row id; the hooks are off the model again."""
    tracer = InfluenceTracer(model, config)
    rows = capture_and_pop(tracer, model, micro_batches, lay_out)
    tracer.remove()
    return {row.row_id: row for row in rows}


def capture_and_pop(
    tracer: InfluenceTracer,
    model: TinyTransformer,
    micro_batches: Sequence[list[Response]],
    lay_out: Callable[[list[Response]], TokenBatch] = padded,
) -> list[RowScores]:
    for responses in micro_batches:
        capture(tracer, model, lay_out(responses))
    rows = sorted((r for responses in micro_batches for r in responses), key=lambda r: r.row_id)
    return tracer.pop_rows([r.group for r in rows], [r.contrast for r in rows])


def capture(tracer: InfluenceTracer, model: TinyTransformer, batch: TokenBatch) -> None:
    with tracer.capture(batch.row_ids):
        objective(model, batch).backward()
