"""Per-token scores by this library, bergson and kronfluence, on one model and the same tokens.

    python benchmarks/influence_peers.py [--json FILE] [--repeats 7] [--peer-repeats 2] [--tiny]

The model is a 1.5B-shaped Qwen2 with random weights in bfloat16, 16 x 2048 tokens in micro-batches of four
rows (``--micro-batch-rows``), without checkpointing; the loss is the sum of the next tokens' cross-entropies.
The unit is a plain forward and backward with the gradients of all weights. Ours is that same training pass
with the tracer's hooks on, and ``pop_rows``, until the scores are on the CPU. A peer is timed from the tokens
to its scores, with all that its users run for it: both make a pass for the gradients that are compared with
and a pass that scores tokens, beside the training.

Agreement is measured where the definitions coincide (the identity for the Hessian): with bergson on the
layers that it and we can project by the same matrices to 16 x 16; with kronfluence, which does not project,
on the layers without a bias, as the correlation that the projection leaves.

Needs bergson 2.5.1 and kronfluence 1.0.1 (with their dependencies); a peer that cannot be imported or fails
is reported with its error.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from influence_measure import Times, interleaved, machine, publish, ratio, require_gpu, table
from influence_shapes import REFERENCE, TINY, Shapes, build_model, random_tokens
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from influence import InfluenceTracer, TracerConfig
from influence.projection import projection_matrix

BERGSON_DIM = 16
WITHOUT_BIAS = ("o_proj", "gate_proj", "up_proj", "down_proj")


class Passes:
    """Forward and backward over all micro-batches, plain or traced."""

    def __init__(self, model: nn.Module, tokens: Tensor, rows: int) -> None:
        self.model = model
        self.tokens = tokens
        self.rows = rows  # of a micro-batch
        self.contrast = [1.0 - 2.0 * (row % 2) for row in range(len(tokens))]
        self.groups = [row // 4 for row in range(len(tokens))]

    def _backward(self, start: int) -> None:
        tokens = self.tokens[start : start + self.rows]
        logits = self.model(tokens).logits[:, :-1]
        flat = logits.reshape(-1, logits.shape[-1])
        cross_entropy(flat, tokens[:, 1:].flatten(), reduction="sum").backward()

    def plain(self) -> None:
        self.model.zero_grad(set_to_none=True)
        for start in range(0, len(self.tokens), self.rows):
            self._backward(start)

    def traced(self, tracer: InfluenceTracer) -> list[Tensor]:
        self.model.zero_grad(set_to_none=True)
        length = self.tokens.shape[1]
        for start in range(0, len(self.tokens), self.rows):
            row_ids = torch.arange(start, start + self.rows)[:, None].expand(-1, length)
            with tracer.capture(row_ids):
                self._backward(start)
        return [row.scores for row in tracer.pop_rows(self.groups, self.contrast)]

    def identity_scores(self, factor: int, modules: Sequence[str]) -> list[Tensor]:
        """Inner products with the contrast's sum over all rows, as both peers define them."""
        config = TracerConfig(
            objective="log_prob",
            contrast="advantage",
            scope="batch",
            hessian="identity",
            exclude_self=False,
            projection_dim_factor=factor,
            modules=tuple(modules),
        )
        tracer = InfluenceTracer(self.model, config)
        try:
            return self.traced(tracer)
        finally:
            tracer.remove()


def traced_names(model: nn.Module) -> list[str]:
    """The seven linear layers of each decoder layer."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]


def same_projections(model: nn.Module, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Our matrices of these layers, for bergson."""
    matrices = {}
    for name in names:
        weight = model.get_submodule(name).get_parameter("weight")
        P_out = projection_matrix(name, "out", weight.shape[0], BERGSON_DIM, 0)
        P_in = projection_matrix(name, "in", weight.shape[1], BERGSON_DIM, 0)
        matrices[name] = (P_out.to(weight), P_in.to(weight))
    return matrices


def agreement(theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> dict[str, float]:
    """Correlations over all tokens but each row's last, and ``|theirs - ours| / |ours|``."""
    a = torch.cat([row[: len(mine) - 1].double().cpu() for row, mine in zip(theirs, ours, strict=True)])
    b = torch.cat([mine[:-1].double().cpu() for mine in ours])
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return {
        "pearson": float(torch.corrcoef(torch.stack([a, b]))[0, 1]),
        "spearman": float(torch.corrcoef(ranks)[0, 1]),
        "relative_difference": float((a - b).norm() / b.norm()),
    }


def attempt(run: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `run` returns, or the last line of its traceback."""
    try:
        return run(), None
    except Exception as error:  # whatever a peer does is a result
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def bergson(passes: Passes, shapes: Shapes, device: torch.device, repeats: int) -> dict[str, Any]:
    from influence_peer_bergson import BergsonScores

    model = copy.deepcopy(passes.model)
    names = traced_names(model)
    square = [name for name in names if name.endswith(("q_proj", "o_proj"))]

    def peer(chosen: Sequence[str], matrices: dict[str, tuple[Tensor, Tensor]] | None) -> BergsonScores:
        return BergsonScores(
            model,
            passes.tokens,
            passes.contrast,
            chosen,
            micro_batch_rows=passes.rows,
            projection_dim=BERGSON_DIM,
            projections=matrices,
        )

    everything = peer(names, None)
    times = interleaved({"scores": everything.scores}, device, repeats=repeats, warm_ups=1)["scores"]
    alike = peer(square, same_projections(model, square))
    ours = passes.identity_scores(shapes.hidden // BERGSON_DIM, ("q_proj", "o_proj"))
    return {
        "times": times,
        "of which the scoring pass": Times((everything.seconds_of_scoring(),)),
        "agreement": {"q_proj and o_proj, same projections": agreement(alike.scores(), ours)},
    }


def kronfluence(passes: Passes, shapes: Shapes, device: torch.device, repeats: int) -> dict[str, Any]:
    from influence_peer_kronfluence import KronfluenceScores

    logging.disable(logging.INFO)
    names = traced_names(passes.model)

    def peer(chosen: Sequence[str]) -> KronfluenceScores:
        return KronfluenceScores(
            copy.deepcopy(passes.model),
            passes.tokens,
            passes.contrast,
            chosen,
            micro_batch_rows=passes.rows,
        )

    times = interleaved({"scores": peer(names).scores}, device, repeats=repeats, warm_ups=1)["scores"]
    gc.collect()
    theirs = peer([name for name in names if name.endswith(WITHOUT_BIAS)]).scores()
    factors = (256, 64, 32) if shapes is REFERENCE else (16, 4)
    return {
        "times": times,
        "agreement": {
            f"layers without bias, our factor {factor}": agreement(
                theirs, passes.identity_scores(factor, WITHOUT_BIAS)
            )
            for factor in factors
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=7, help="of plain and ours")
    parser.add_argument("--peer-repeats", type=int, default=2, help="0: without peers")
    parser.add_argument("--micro-batch-rows", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it on a CPU")
    arguments = parser.parse_args()
    require_gpu(parser, tiny=arguments.tiny)

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    shapes, batch, length = (TINY, 8, 40) if arguments.tiny else (REFERENCE, 16, 2048)
    untouched = Passes(
        build_model(shapes, device), random_tokens(shapes, batch, length, device), arguments.micro_batch_rows
    )
    hooked = Passes(copy.deepcopy(untouched.model), untouched.tokens, untouched.rows)
    tracer = InfluenceTracer(
        hooked.model,
        TracerConfig(
            objective="log_prob",
            contrast="accepted_minus_rejected",
            projection_dim_factor=16 if arguments.tiny else 256,
        ),
    )
    variants: dict[str, Callable[[], object]] = {
        "forward + backward": untouched.plain,
        "ours, scores included": lambda: hooked.traced(tracer),
    }
    times = interleaved(variants, device, repeats=arguments.repeats, warm_ups=2)
    tracer.remove()
    base = times["forward + backward"]
    ours_ratio = ratio(times["ours, scores included"], base)
    hooked.model.zero_grad(set_to_none=True)
    untouched.model.zero_grad(set_to_none=True)
    del hooked.model

    errors: dict[str, str] = {}
    agreements: dict[str, dict[str, dict[str, float]]] = {}
    peers = {"bergson 2.5.1 (16)": bergson, "kronfluence 1.0.1 (identity)": kronfluence}
    for name, peer in peers.items() if arguments.peer_repeats else ():
        result, error = attempt(partial(peer, untouched, shapes, device, arguments.peer_repeats))
        if error is not None:
            errors[name] = error
        else:
            times[name] = result["times"]
            if "of which the scoring pass" in result:
                times[f"{name}: of which the scoring pass"] = result["of which the scoring pass"]
            agreements[name] = result["agreement"]

    rows = []
    for name, taken in times.items():
        of_plain = f"{taken.median / base.median:.2f}"
        if name.startswith("ours"):
            of_plain = f"{ours_ratio.median:.4f} ± {ours_ratio.spread:.4f}"
        rows.append([name, f"{taken.median * 1e3:,.1f}", f"{batch * length / taken.median:,.0f}", of_plain])
    rows += [[name, "-", "-", error] for name, error in errors.items()]
    tables = [
        table(["16 x 2048 tokens" if not arguments.tiny else "tiny", "ms", "tokens/s", "x plain"], rows),
        table(
            ["agreement with ours", "Pearson", "Spearman", "relative difference"],
            [
                [f"{name}: {what}", *(f"{value:.4f}" for value in found.values())]
                for name, by_what in agreements.items()
                for what, found in by_what.items()
            ],
        ),
    ]
    results = {
        "machine": machine(device),
        "tokens": batch * length,
        "times": {name: taken.to_json() for name, taken in times.items()},
        "ours_over_plain": ours_ratio.to_json(),
        "agreement": agreements,
        "errors": errors,
    }
    publish(results, tables, arguments.json)


if __name__ == "__main__":
    main()
