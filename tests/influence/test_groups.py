"""Which rows are brought together and compared, and how often ranks talk to each other for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from influence import TracerConfig, groups
from influence.groups import GroupPlan, gather_rows, plan_groups
from tests.influence.test_distributed import on_ranks

NUM_ROWS = (3, 0, 5)


def rows_of(rank: int) -> tuple[list[int], list[float], torch.Tensor]:
    first, count = sum(NUM_ROWS[:rank]), NUM_ROWS[rank]
    own = range(first, first + count)
    return (
        [10 * row for row in own],
        [row - 1 / 3 for row in own],
        torch.arange(first, first + count)[:, None] * torch.ones(2),
    )


def gather_on(rank: int, table_rows: int) -> dict[str, Any]:
    calls = []
    groups.TABLE_ROWS = table_rows  # type: ignore[misc]
    original = dist.all_gather
    dist.all_gather = lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1]
    rows = gather_rows(*rows_of(rank), dist.group.WORLD)
    return {
        "groups": rows.groups,
        "contrast": rows.contrast,
        "local": list(rows.local),
        "ranks": [list(part) for part in rows.ranks],
        "gradients": rows.gradients,
        "calls": len(calls),
    }


def gather(rank: int) -> dict[str, Any]:
    return gather_on(rank, 512)


def gather_with_small_tables(rank: int) -> dict[str, Any]:
    return gather_on(rank, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "num_calls"),
    [(gather, 2), (gather_with_small_tables, 3)],
    ids=["two exchanges", "more rows than fit"],
)
def test_every_rank_gets_the_rows_of_all(job: Any, num_calls: int, tmp_path: Path) -> None:
    for rank, found in enumerate(on_ranks(job, 3, tmp_path)):
        assert found["groups"] == [10 * row for row in range(8)]
        assert found["contrast"] == [row - 1 / 3 for row in range(8)]
        assert found["ranks"] == [[0, 1, 2], [], [3, 4, 5, 6, 7]]
        assert found["local"] == found["ranks"][rank]
        assert torch.equal(found["gradients"], torch.arange(8)[:, None] * torch.ones(2))
        assert found["calls"] == num_calls


def plan(ids: list[int], signs: list[float], local: range, **options: Any) -> GroupPlan:
    return plan_groups(ids, signs, local, TracerConfig(objective="log_prob", **options))


def test_groups_of_one_size_are_stacked() -> None:
    found = plan([5, 7, 5, 7, 9, 9, 9], [1.0] * 7, range(7))
    assert found.stacks == [[[0, 2], [1, 3]], [[4, 5, 6]]]
    assert found.scored_groups == [[0, 2], [1, 3], [4, 5, 6]]


def test_a_rank_solves_its_groups_only_and_knows_the_others() -> None:
    found = plan([5, 5, 7, 7, 5], [1.0] * 5, range(4, 5))
    assert found.stacks == [[[0, 1, 4]]]
    assert found.scored_groups == [[0, 1, 4], [2, 3]]
    assert (found.num_counted, found.num_counted_rows) == (0, 0)


def test_groups_without_contrast_are_left_out_and_counted() -> None:
    ids, signs = [0, 0, 1, 1, 2, 3, 3], [1.0, -1.0, 1.0, 1.0, -1.0, 0.0, 0.0]
    signed = plan(ids, signs, range(7), contrast="accepted_minus_rejected")
    assert signed.scored_groups == [[0, 1]]
    assert (signed.num_counted, signed.num_counted_skipped, signed.num_counted_rows) == (4, 3, 2)
    alone = plan(ids, signs, range(7), contrast="advantage", exclude_self=False)
    assert alone.scored_groups == [[0, 1], [2, 3], [4]]
    left_out = plan(ids, signs, range(7), contrast="advantage", exclude_self=True)
    assert left_out.scored_groups == [[0, 1], [2, 3]]
