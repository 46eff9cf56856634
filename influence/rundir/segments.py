"""Lineages: which attempts computed the steps that some weights grew from."""

from __future__ import annotations

from typing import NamedTuple

from influence.rundir.fields import Fields


class Segment(NamedTuple):
    """Steps that one attempt contributed to a lineage."""

    attempt: int
    first_step: int
    last_step: int | None
    """None: as far as the attempt came."""


def read_segments(fields: Fields, name: str) -> tuple[Segment, ...]:
    """A lineage: attempts in increasing order whose steps follow on one another from step 1."""
    segments: list[Segment] = []
    next_step, last_attempt = 1, 0
    for entry in fields.array(name):
        if not (isinstance(entry, list) and len(entry) == 3):
            raise fields.error(f"{name} holds {ascii(entry)[:80]}, not [attempt, first step, last step]")
        attempt, first, last = entry
        if (
            type(attempt) is not int
            or attempt <= last_attempt
            or type(first) is not int
            or first != next_step
            or not (last is None or (type(last) is int and last >= first))
        ):
            raise fields.error(
                f"{name} holds {ascii(entry)[:80]} after step {next_step - 1} of attempt {last_attempt}"
            )
        segments.append(Segment(attempt, first, last))
        last_attempt = attempt
        # nothing can follow an open segment: no step is this one
        next_step = -1 if last is None else last + 1
    return tuple(segments)
