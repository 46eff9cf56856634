"""Which responses are compared with each other, wherever they lie.

A batch may be balanced over ranks without regard to prompts, so the gradients of all responses are gathered
on every rank (at most 80 KB a response for a 1.5B model at factor 256), and each rank solves the groups
that it has a row of.
"""

from __future__ import annotations

import reprlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite, nan
from operator import index
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from influence.config import TracerConfig
from influence.staging import to_device

TABLE_ROWS: Final = 512
"""Rows of a rank that fit into the first exchange; with more, group ids and contrasts take one more."""

_NO_NUMBERS: Final = (bool, np.bool_, str, bytes, bytearray)
"""What `float` takes, and no caller can have meant as a number."""
_NOT_CONVERTED: Final = (TypeError, ValueError, OverflowError, RuntimeError)


class GatherError(RuntimeError):
    """Another rank passed arguments that do not fit; its own message says which."""


@dataclass(frozen=True, slots=True, eq=False)
class GatheredRows:
    """All N rows of all ranks, rank by rank."""

    groups: list[int]
    contrast: list[float]
    local: range
    """This rank's rows among the N."""
    gradients: Tensor
    """[N, D], laid out by a `FactorLayout`."""
    ranks: tuple[range, ...] = ()
    """Each rank's rows among the N; empty without a process group."""


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """The groups that this rank must solve, those of one size together, and what it counts of all groups.

    A group is counted by the rank of its first row, so that sums over ranks count each group once.
    """

    stacks: list[list[list[int]]]
    """Rows (indices into the N) of each group, groups of equal size in one list."""
    scored_groups: list[list[int]]
    """Rows of every group on any rank that has a contrast, in the order of their first rows."""
    num_counted: int
    num_counted_skipped: int
    num_counted_rows: int
    """Of the counted groups that are not skipped, on all ranks."""

    def rows_in_groups(self, local: range) -> list[int]:
        """The local rows of groups that are solved, counted from this rank's first."""
        members = (row for stack in self.stacks for group in stack for row in group)
        return [row - local.start for row in members if row in local]


def check_rows(
    groups: Sequence[int], contrast: Sequence[float], num_rows: int
) -> tuple[list[int], list[float]]:
    """The arguments of ``pop_rows`` for `num_rows` captured rows as plain numbers.

    Raises ValueError where there is not one entry a row, a group is no whole number of 64 bits, or a
    contrast no finite number; nothing is rounded, and no text or truth value taken for a number.
    """
    return (
        [_group_id(value, row) for row, value in enumerate(_entries("groups", groups, num_rows))],
        [_contrast(value, row) for row, value in enumerate(_entries("contrast", contrast, num_rows))],
    )


def gather_rows(
    groups: Sequence[int],
    contrast: Sequence[float],
    gradients: Tensor,
    process_group: dist.ProcessGroup | None,
) -> GatheredRows:
    """Bring the rows of all ranks together; collective when a process group is given.

    `gradients` [n, D] are this rank's; n may differ from rank to rank and be 0. Two collectives: the table
    of who has which rows, which the host waits for, and the gradients, which it does not.

    Raises ValueError (see `check_rows`), and GatherError on the other ranks, before gradients are exchanged.
    """
    num_rows, width = gradients.shape
    if process_group is None:
        return GatheredRows(*check_rows(groups, contrast, num_rows), range(num_rows), gradients)

    problem: Exception | None = None
    checked: tuple[list[int], list[float]] = ([], [])
    try:
        checked = check_rows(groups, contrast, num_rows)
    except Exception as error:  # also one of the caller's own sequence: the other ranks wait to hear of it
        problem = error
    ids, signs = checked
    header = [num_rows, width, problem is None]
    tables = _exchange(header, ids, signs, TABLE_ROWS, gradients.device, process_group)
    if problem is not None:
        raise problem
    rank = dist.get_rank(process_group)
    for other, (_, other_width, is_valid) in enumerate(tables[:, :3].tolist()):
        if not is_valid:
            raise GatherError(f"rank {other} of the process group passed arguments that do not fit its rows")
        if other_width != width:
            raise GatherError(f"rank {other} traces {other_width} numbers a row, rank {rank} {width}")
    counts: list[int] = tables[:, 0].tolist()
    if max(counts) > TABLE_ROWS:
        tables = _exchange(header, ids, signs, max(counts), gradients.device, process_group)

    first = sum(counts[:rank])
    columns = tables[:, 3:].reshape(len(counts), 2, -1)
    return GatheredRows(
        groups=[g for c, (part, _) in zip(counts, columns, strict=True) for g in part[:c].tolist()],
        contrast=[
            value
            for count, (_, part) in zip(counts, columns, strict=True)
            for value in part[:count].view(np.float64).tolist()
        ],
        local=range(first, first + num_rows),
        gradients=_all_gather_rows(gradients, counts, process_group),
        ranks=tuple(range(end - count, end) for end, count in zip(accumulate(counts), counts, strict=True)),
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
    scored_groups: list[list[int]] = []
    num_counted = num_skipped = num_rows = 0
    for rows in members.values():
        is_scored = _has_contrast([contrast[row] for row in rows], config)
        if rows[0] in local:
            num_counted += 1
            num_skipped += not is_scored
            num_rows += len(rows) if is_scored else 0
        if is_scored:
            scored_groups.append(rows)
        if is_scored and any(row in local for row in rows):
            stacks[len(rows)].append(rows)
    return GroupPlan(list(stacks.values()), scored_groups, num_counted, num_skipped, num_rows)


def _has_contrast(values: Sequence[float], config: TracerConfig) -> bool:
    if config.exclude_self and len(values) < 2:
        return False
    if config.contrast == "accepted_minus_rejected":
        return any(c > 0 for c in values) and any(c < 0 for c in values)
    return any(c != 0 for c in values)


def _entries(name: str, values: object, num_rows: int) -> list[Any]:
    """One entry a row. A tensor's at once: each by itself would make the host wait for a device."""
    if isinstance(values, Tensor | np.ndarray):
        listed = values.tolist()
    elif isinstance(values, Iterable) and not isinstance(values, Mapping | Set):
        listed = list(values)
    else:
        listed = None
    if not isinstance(listed, list):
        raise ValueError(f"{name} is {_shown(values)}; give a sequence with an entry a row")
    if len(listed) != num_rows:
        raise ValueError(
            f"{name} has {len(listed)} entries where {num_rows} rows were captured; give one a row"
        )
    return listed


def _group_id(value: Any, row: int) -> int:
    try:
        group = None if isinstance(value, bool) else index(value)
    except _NOT_CONVERTED:
        group = None
    if group is None or not -(2**63) <= group < 2**63:
        raise ValueError(f"group of row {row} is {_shown(value)}; it must be a whole number of 64 bits")
    return group


def _contrast(value: Any, row: int) -> float:
    try:
        number = nan if isinstance(value, _NO_NUMBERS) else float(value)
    except _NOT_CONVERTED:
        number = nan
    if not isfinite(number):
        raise ValueError(f"contrast of row {row} is {_shown(value)}; it must be a finite number")
    return number


def _shown(value: object) -> str:
    return reprlib.repr(value)


def _exchange(
    header: Sequence[int],
    ids: Sequence[int],
    signs: Sequence[float],
    capacity: int,
    device: torch.device,
    process_group: dist.ProcessGroup,
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """All ranks' tables, int64 [ranks, 3 + 2 capacity]: header, group ids, and the contrasts' bits.

    Rows beyond `capacity` are left out.
    """
    table = np.zeros(3 + 2 * capacity, dtype=np.int64)
    table[:3] = header
    num_sent = min(len(ids), capacity)
    table[3 : 3 + num_sent] = ids[:num_sent]
    table[3 + capacity : 3 + capacity + num_sent] = np.asarray(signs[:num_sent], np.float64).view(np.int64)
    (own,) = to_device([table], device)
    return _all_gather(own, process_group).cpu().numpy()


def _all_gather(tensor: Tensor, process_group: dist.ProcessGroup) -> Tensor:
    """[ranks, *shape]."""
    merged = tensor.new_empty(dist.get_world_size(process_group), *tensor.shape)
    dist.all_gather(list(merged.unbind()), tensor, group=process_group)
    return merged


def _all_gather_rows(rows: Tensor, counts: Sequence[int], process_group: dist.ProcessGroup) -> Tensor:
    """Concatenate tensors whose first dimension differs by rank: padded to the longest, cut afterwards."""
    longest = max(counts)
    padded = rows.contiguous()
    if rows.shape[0] < longest:
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
    merged = _all_gather(padded, process_group)
    if min(counts) == longest:
        return merged.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(merged, counts, strict=True)])
