"""What ``from influence import ...`` offers."""

from __future__ import annotations

import inspect

import pytest

import influence
from influence.score import RowScores
from influence.tracer import InfluenceTracer


def test_every_public_name_loads_and_is_documented() -> None:
    assert sorted(influence.__all__) == influence.__all__ == sorted(influence._HOMES)
    for name in influence.__all__:
        assert inspect.getdoc(getattr(influence, name)), name
    assert set(influence.__all__) <= set(dir(influence))
    with pytest.raises(AttributeError, match="nothing"):
        influence.nothing  # noqa: B018


def test_the_tracer_and_its_rows_have_the_members_that_a_training_loop_uses() -> None:
    public = {name for name in vars(InfluenceTracer) if not name.startswith("_")}
    assert {"capture", "pop_rows", "pop_timing", "debug_stats", "remove"} <= public
    assert all(inspect.getdoc(getattr(InfluenceTracer, name)) for name in public)
    assert list(inspect.signature(InfluenceTracer).parameters) == ["model", "config", "process_group"]
    assert {"row_id", "scores", "positions", "total", "scored"} == set(RowScores.__slots__)
