"""``pop_rows`` on several GPUs, with groups that span them, beside the same rows on one.

    torchrun --standalone --nproc-per-node 2 benchmarks/influence_two_gpus.py [--json FILE] [--tiny]

The reference run's sizes, as in ``influence_pop_rows.py``; the micro-batches are dealt out to the ranks in
turn, so that every group has rows on all of them. Each rank scores its own rows against all. The first rank
then scores all rows by itself, without a process group, and compares. With ``--tiny`` Gloo and the CPU serve
where there is no GPU.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
import torch.distributed as dist
from influence_measure import interleaved, machine, publish, require_gpu, synchronize, table
from influence_shapes import REFERENCE, TINY, build_model
from influence_synthetic import ROWS_IN_MICRO_BATCH, captured_rows, layout_of, put

from influence import InfluenceTracer, TracerConfig

PHASES = {
    "grad_staging": "of it, grad_staging",
    "hessian_solve": "of it, hessian_solve",
    "token_scoring": "of it, token_scoring",
    "score_aggregation": "of it, score_aggregation",
    "other": "of it, other",
    "all_gather": "in grad_staging, all_gather",
    "copy_to_host": "in score_aggregation, copy_to_host",
}
"""Each phase, and parts of phases, with its row's heading."""


def dealt(num_rows: int, rank: int, num_ranks: int) -> list[int]:
    """The rows of one rank: micro-batches in turn."""
    return [row for row in range(num_rows) if row // ROWS_IN_MICRO_BATCH % num_ranks == rank]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--factor", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it on a CPU")
    arguments = parser.parse_args()
    require_gpu(parser, tiny=arguments.tiny)

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    shapes = TINY if arguments.tiny else REFERENCE
    factor = arguments.factor or (16 if arguments.tiny else 256)
    config = TracerConfig(
        objective="log_prob", contrast="accepted_minus_rejected", projection_dim_factor=factor
    )
    model = build_model(shapes, device)
    lengths = shapes.row_lengths()
    groups, contrast = shapes.groups_and_contrast()

    tracer = InfluenceTracer(model, config, process_group=dist.group.WORLD)
    rows = dealt(shapes.rows, rank, num_ranks)
    batches = captured_rows(layout_of(tracer), lengths, rows, device)
    own_groups, own_contrast = [groups[row] for row in rows], [contrast[row] for row in rows]
    phases: list[dict[str, float]] = []

    def tidy() -> None:
        put(tracer, batches)
        phases.append(tracer.pop_timing())
        dist.barrier()
        synchronize(device)

    tidy()
    times = interleaved(
        {"pop_rows": lambda: tracer.pop_rows(own_groups, own_contrast)},
        device,
        repeats=arguments.repeats,
        warm_ups=3,
        tidy=tidy,
    )["pop_rows"]
    taken = {name: statistics.median(p.get(name, 0.0) for p in phases[4:]) for name in PHASES}
    scores = torch.cat([row.scores for row in tracer.pop_rows(own_groups, own_contrast)])
    gathered = [scores] * num_ranks
    dist.all_gather_object(gathered, scores)

    if rank == 0:
        alone = InfluenceTracer(model, config)
        everything = captured_rows(layout_of(alone), lengths, range(shapes.rows), device)
        put(alone, everything)
        single = interleaved(
            {"pop_rows": lambda: alone.pop_rows(groups, contrast)},
            device,
            repeats=arguments.repeats,
            warm_ups=3,
            tidy=lambda: put(alone, everything),
        )["pop_rows"]
        expected = alone.pop_rows(groups, contrast)
        errors = []
        for other, part in enumerate(gathered):
            right = torch.cat([expected[row].scores for row in dealt(shapes.rows, other, num_ranks)])
            errors.append(float((part.double() - right.double()).norm() / right.double().norm()))
        results = {
            "machine": machine(device),
            "ranks": num_ranks,
            "times": {"all ranks": times.to_json(), "one": single.to_json()},
            "phases_s": taken,
            "all_gather_share": taken["all_gather"] / times.median,
            "relative_difference": errors,
        }
        lines = [
            [f"pop_rows on {num_ranks} ranks, ms", f"{times.median * 1e3:.2f} ± {times.spread * 1e3:.2f}"],
            *([PHASES[name], f"{seconds * 1e3:.2f}"] for name, seconds in taken.items()),
            ["share of the all-gather", f"{100 * taken['all_gather'] / times.median:.1f} %"],
            ["pop_rows of all rows on one, ms", f"{single.median * 1e3:.2f} ± {single.spread * 1e3:.2f}"],
            ["relative difference of each rank's scores", ", ".join(f"{error:.1e}" for error in errors)],
        ]
        publish(results, [table([f"{shapes.tokens:,} tokens", "value"], lines)], arguments.json)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
