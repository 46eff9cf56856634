"""Which responses are compared with each other, wherever they lie.

A batch may be balanced over ranks without regard to prompts, so the gradients of all responses are gathered
on every rank (at most 80 KB a response for a 1.5B model at factor 256), and each rank solves the groups
that it has a row of.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
import torch.distributed as dist
from torch import Tensor

from influence.config import TracerConfig


class GatherError(RuntimeError):
    """Another rank passed arguments that do not fit; its own message says which."""


@dataclass(frozen=True, slots=True, eq=False)
class GatheredRows:
    """All N rows of all ranks, rank by rank."""

    groups: list[int]
    contrast: list[float]
    local: range
    """This rank's rows among the N."""
    gradients: list[Tensor]
    """By class of module shape: [C, N, D]."""


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """The groups that this rank must solve, those of one size together, and what it counts of all groups.

    A group is counted by the rank of its first row, so that sums over ranks count each group once.
    """

    stacks: list[list[list[int]]]
    """Rows (indices into the N) of each group, groups of equal size in one list."""
    num_counted: int
    num_counted_skipped: int
    num_counted_rows: int
    """Of the counted groups that are not skipped, on all ranks."""


def check_rows(groups: Sequence[int], contrast: Sequence[float], num_rows: int) -> str | None:
    """What is wrong with the arguments of ``pop_rows`` for `num_rows` captured rows, or None."""
    for name, values in (("groups", groups), ("contrast", contrast)):
        if len(values) != num_rows:
            return f"{name} has {len(values)} entries where {num_rows} rows were captured; give one a row"
    bad = [i for i, value in enumerate(contrast) if not isfinite(value)]
    return f"contrast of row {bad[0]} is {contrast[bad[0]]}; it must be finite" if bad else None


def gather_rows(
    groups: Sequence[int],
    contrast: Sequence[float],
    gradients: Sequence[Tensor],
    process_group: dist.ProcessGroup | None,
) -> GatheredRows:
    """Bring the rows of all ranks together; collective when a process group is given.

    `gradients` are this rank's, by class [C, n, D]; n may differ from rank to rank and be 0.

    Raises ValueError (see `check_rows`), and GatherError on the other ranks, before anything is exchanged.
    """
    num_rows = gradients[0].shape[1]
    problem = check_rows(groups, contrast, num_rows)
    if process_group is None:
        if problem:
            raise ValueError(problem)
        return GatheredRows(
            [int(g) for g in groups], [float(c) for c in contrast], range(num_rows), [*gradients]
        )

    device = gradients[0].device
    widths = [g.shape[0] * g.shape[2] for g in gradients]
    header = torch.tensor([num_rows, sum(widths), problem is None], device=device)
    headers = [h.tolist() for h in _all_gather(header, process_group)]
    if problem:
        raise ValueError(problem)
    rank = dist.get_rank(process_group)
    for other, (_, width, is_valid) in enumerate(headers):
        if not is_valid:
            raise GatherError(f"rank {other} of the process group passed arguments that do not fit its rows")
        if width != sum(widths):
            raise GatherError(f"rank {other} traces {width} numbers a row, rank {rank} {sum(widths)}")

    counts = [count for count, _, _ in headers]
    first = sum(counts[:rank])
    ids = torch.tensor([int(g) for g in groups], dtype=torch.int64, device=device)
    signs = torch.tensor([float(c) for c in contrast], dtype=torch.float64, device=device)
    # Rows first, so that a rank's part is contiguous.
    flat = torch.cat(
        [g.transpose(0, 1).reshape(num_rows, width) for g, width in zip(gradients, widths, strict=True)], 1
    )
    merged = _all_gather_rows(flat, counts, process_group)
    return GatheredRows(
        groups=_all_gather_rows(ids, counts, process_group).tolist(),
        contrast=_all_gather_rows(signs, counts, process_group).tolist(),
        local=range(first, first + num_rows),
        gradients=[
            part.reshape(sum(counts), own.shape[0], own.shape[2]).transpose(0, 1)
            for part, own in zip(torch.split(merged, widths, dim=1), gradients, strict=True)
        ],
    )


def plan_groups(
    groups: Sequence[int], contrast: Sequence[float], local: range, config: TracerConfig
) -> GroupPlan:
    """Sort the rows into groups, leave out those without contrast, and stack those of one size.

    A group has no contrast when all its c_r are 0; when they have one sign under ``accepted_minus_rejected``;
    and when it is a single response that is to be left out of its own direction.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group if config.scope == "per_prompt" else 0].append(row)
    stacks: dict[int, list[list[int]]] = defaultdict(list)
    num_counted = num_skipped = num_rows = 0
    for rows in members.values():
        is_scored = _has_contrast([contrast[row] for row in rows], config)
        if rows[0] in local:
            num_counted += 1
            num_skipped += not is_scored
            num_rows += len(rows) if is_scored else 0
        if is_scored and any(row in local for row in rows):
            stacks[len(rows)].append(rows)
    return GroupPlan(list(stacks.values()), num_counted, num_skipped, num_rows)


def _has_contrast(values: Sequence[float], config: TracerConfig) -> bool:
    if config.exclude_self and len(values) < 2:
        return False
    if config.contrast == "accepted_minus_rejected":
        return any(c > 0 for c in values) and any(c < 0 for c in values)
    return any(c != 0 for c in values)


def _all_gather(tensor: Tensor, process_group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(parts, tensor, group=process_group)
    return parts


def _all_gather_rows(rows: Tensor, counts: Sequence[int], process_group: dist.ProcessGroup) -> Tensor:
    """Concatenate tensors whose first dimension differs by rank: padded to the longest, cut afterwards."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    parts = _all_gather(padded, process_group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
