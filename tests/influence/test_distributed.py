"""Several processes over gloo: groups across ranks, ranks without rows, wrong arguments, sharded weights."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from influence import InfluenceTracer, TracerConfig
from tests.influence.brute_force import relative_error
from tests.influence.tiny_model import (
    Layer,
    Response,
    TinyTransformer,
    make_responses,
    objective,
    padded,
    token_terms,
)
from tests.influence.tracing import capture, capture_and_pop, trace

pytestmark = pytest.mark.slow

CONFIG = TracerConfig(projection_dim_factor=2)
RESPONSES = make_responses(num_responses=7, num_groups=2)
SHARDED_RESPONSES = make_responses(num_responses=8, num_groups=2)


def on_ranks(job: Callable[[int], Any], num_ranks: int, folder: Path) -> list[Any]:
    """Run `job` on each rank and return what each returned."""
    mp.spawn(_rank, args=(job, num_ranks, str(folder)), nprocs=num_ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(num_ranks)]


def _rank(rank: int, job: Callable[[int], Any], num_ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(minutes=2),
    )
    try:
        torch.save(job(rank), f"{folder}/{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def rows_of_rank(rank: int, num_ranks: int) -> list[list[Response]]:
    """Groups span ranks; a third rank of three has no rows, and those of four have different numbers."""
    holders = 2 if num_ranks == 3 else num_ranks
    if rank >= holders:
        return []
    mine = [r for i, r in enumerate(RESPONSES) if i * holders // len(RESPONSES) == rank]
    return [part for part in (mine[:2], mine[2:]) if part]


def score_on(rank: int, num_ranks: int, scope: str) -> dict[str, Any]:
    model = TinyTransformer()
    config = TracerConfig(projection_dim_factor=2, scope=scope)
    tracer = InfluenceTracer(model, config, process_group=dist.group.WORLD)
    rows = capture_and_pop(tracer, model, rows_of_rank(rank, num_ranks))
    return {
        "scores": {row.row_id: row.scores for row in rows},
        "totals": {row.row_id: row.total for row in rows},
        "stats": tracer.debug_stats(),
    }


def score_per_prompt_on_2(rank: int) -> dict[str, Any]:
    return score_on(rank, 2, "per_prompt")


def score_per_prompt_on_3(rank: int) -> dict[str, Any]:
    return score_on(rank, 3, "per_prompt")


def score_per_prompt_on_4(rank: int) -> dict[str, Any]:
    return score_on(rank, 4, "per_prompt")


def score_batch_on_2(rank: int) -> dict[str, Any]:
    return score_on(rank, 2, "batch")


@pytest.mark.parametrize(
    ("job", "num_ranks", "scope"),
    [
        (score_per_prompt_on_2, 2, "per_prompt"),
        (score_per_prompt_on_3, 3, "per_prompt"),
        (score_per_prompt_on_4, 4, "per_prompt"),
        (score_batch_on_2, 2, "batch"),
    ],
    ids=["2 ranks", "3 ranks, one without rows", "4 ranks", "batch"],
)
def test_the_number_of_ranks_does_not_matter(
    job: Callable[[int], Any], num_ranks: int, scope: str, tmp_path: Path
) -> None:
    by_rank = on_ranks(job, num_ranks, tmp_path)
    expected = trace(TinyTransformer(), [RESPONSES], TracerConfig(projection_dim_factor=2, scope=scope))
    found = {row_id: scores for result in by_rank for row_id, scores in result["scores"].items()}
    totals = {row_id: total for result in by_rank for row_id, total in result["totals"].items()}
    assert set(found) == set(expected)
    for row_id, row in expected.items():
        assert relative_error(found[row_id], row.scores) < 1e-11
        assert totals[row_id] == pytest.approx(row.total, rel=1e-11)
    # Sums over ranks count every group and row once.
    assert sum(result["stats"]["groups"] for result in by_rank) == (2 if scope == "per_prompt" else 1)
    assert sum(result["stats"]["rows_emitted"] for result in by_rank) == len(RESPONSES)


def _broken() -> Iterator[int]:
    yield 0
    raise KeyError("the caller's own")


WRONG_ARGUMENTS: dict[str, tuple[Any, Any, str]] = {
    "too many": ([0, 0], [1.0] * 3, "ValueError: contrast has 3 entries where 2 rows"),
    "not whole": ([0, 0.5], [1.0, 1.0], "ValueError: group of row 1 is 0.5"),
    "not a number": ([math.nan, 0], [1.0, 1.0], "ValueError: group of row 0 is nan"),
    "too large": ([2**63, 0], [1.0, 1.0], "ValueError: group of row 0 is 9223372036854775808"),
    "no sequence": (5, [1.0, 1.0], "ValueError: groups is 5"),
    "nothing": ([0, 0], [None, None], "ValueError: contrast of row 0 is None"),
    "an error of its own": (_broken(), [1.0, 1.0], 'KeyError: "the caller\'s own"'),
}


def pass_wrong_arguments_on_rank_1(rank: int) -> dict[str, str]:
    model = TinyTransformer()
    tracer = InfluenceTracer(model, CONFIG, process_group=dist.group.WORLD)
    capture(tracer, model, padded(RESPONSES[:2]))
    found = {}
    for name, (ids, contrast, _) in WRONG_ARGUMENTS.items():
        try:
            tracer.pop_rows(*((ids, contrast) if rank == 1 else ([0, 0], [1.0, 1.0])))
        except (RuntimeError, ValueError, KeyError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    found["rows"] = str(len(tracer.pop_rows([0, 0], [1.0, 1.0])))
    return found


def test_wrong_arguments_on_one_rank_end_all_and_hang_none(tmp_path: Path) -> None:
    first, second = on_ranks(pass_wrong_arguments_on_rank_1, 2, tmp_path)
    for name, (_, _, message) in WRONG_ARGUMENTS.items():
        assert first[name].startswith("GatherError: rank 1")
        assert second[name].startswith(message)
    assert first["rows"] == second["rows"] == "2"


def sharded(model: TinyTransformer) -> TinyTransformer:
    """As FSDP2 does it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def wrapped(model: TinyTransformer, use_orig_params: bool) -> Any:
    """As FSDP1 does it: the names change, and without original parameters the weights are views."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Layer}),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
    )


def score_sharded(rank: int) -> dict[str, Any]:
    models = {
        "FSDP2": sharded(TinyTransformer()),
        "FSDP2, checkpointing": sharded(TinyTransformer(checkpointing="non_reentrant")),
        "FSDP1": wrapped(TinyTransformer(), use_orig_params=False),
        "FSDP1, original parameters": wrapped(TinyTransformer(), use_orig_params=True),
    }
    result: dict[str, Any] = {}
    for kind, model in models.items():
        tracer = InfluenceTracer(model, CONFIG, process_group=dist.group.WORLD)
        # Every rank runs as many micro-batches: the gathers of weights are collective.
        mine = SHARDED_RESPONSES[4 * rank : 4 * rank + 4]
        rows = capture_and_pop(tracer, model, [mine[:2], mine[2:]])
        result[kind] = {row.row_id: row.scores for row in rows}
    return result


def share_the_forward_of_sharded(rank: int) -> dict[str, Any]:
    """A training loss beside the objective; rank 1 has no rows in its second micro-batch."""
    result: dict[str, Any] = {}
    for checkpointing in (None, "non_reentrant"):
        model, plain = (sharded(TinyTransformer(checkpointing=checkpointing)) for _ in range(2))
        tracer = InfluenceTracer(model, CONFIG, process_group=dist.group.WORLD)
        mine = SHARDED_RESPONSES[:6] if rank == 0 else SHARDED_RESPONSES[6:]
        for part in (mine[:2], mine[2:]):
            batch = padded(part or mine[:1])
            row_ids = batch.row_ids if part else torch.full_like(batch.row_ids, -1)
            with tracer.capture(row_ids) as micro_batch:
                terms = token_terms(model, batch)
                micro_batch.backward(terms.sum(), retain_graph=True)
            terms.square().sum().backward()
            token_terms(plain, batch).square().sum().backward()
        rows = tracer.pop_rows([r.group for r in mine], [r.contrast for r in mine])
        result[str(checkpointing)] = {
            "scores": {row.row_id: row.scores for row in rows},
            "same_gradients": all(
                torch.equal(a.grad.to_local(), b.grad.to_local())
                for a, b in zip(model.parameters(), plain.parameters(), strict=True)
            ),
        }
    return result


def gradients_of_sharded(rank: int) -> bool:
    """Whether a traced and an untraced sharded model have bitwise equal gradients."""
    batch = padded(SHARDED_RESPONSES[4 * rank : 4 * rank + 4])
    plain, traced = sharded(TinyTransformer()), sharded(TinyTransformer())
    objective(plain, batch).backward()
    capture(InfluenceTracer(traced, CONFIG, process_group=dist.group.WORLD), traced, batch)
    return all(
        torch.equal(a.grad.to_local(), b.grad.to_local())
        for a, b in zip(plain.parameters(), traced.parameters(), strict=True)
    )


def test_sharded_models_score_as_whole_ones(tmp_path: Path) -> None:
    by_rank = on_ranks(score_sharded, 2, tmp_path)
    expected = trace(TinyTransformer(), [SHARDED_RESPONSES], CONFIG)
    assert len(by_rank[0]) == 4
    for kind in by_rank[0]:
        found = {**by_rank[0][kind], **by_rank[1][kind]}
        assert set(found) == set(expected)
        for row_id, row in expected.items():
            assert relative_error(found[row_id], row.scores) < 1e-11


def test_sharded_models_share_a_forward_between_objective_and_loss(tmp_path: Path) -> None:
    by_rank = on_ranks(share_the_forward_of_sharded, 2, tmp_path)
    expected = trace(TinyTransformer(), [SHARDED_RESPONSES], CONFIG)
    for kind in by_rank[0]:
        assert all(result[kind]["same_gradients"] for result in by_rank)
        found = {**by_rank[0][kind]["scores"], **by_rank[1][kind]["scores"]}
        assert set(found) == set(expected)
        for row_id, row in expected.items():
            assert relative_error(found[row_id], row.scores) < 1e-11


def test_tracing_leaves_sharded_gradients_bitwise_equal(tmp_path: Path) -> None:
    assert on_ranks(gradients_of_sharded, 2, tmp_path) == [True, True]
