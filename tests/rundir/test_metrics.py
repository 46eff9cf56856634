from __future__ import annotations

import pytest

from influence.rundir import CorruptError, RunPaths, read_metrics

LINES = [
    b'{"step":0,"data":{"val/accuracy":0.1}}\n',
    b'{"step":1,"data":{"actor/loss":0.5,"actor/grad_norm":null}}\n',
    b'{"step":1,"data":{"actor/loss":0.4,"timing_s/step":7.0}}\n',
    b'{"step":2,"data":{"actor/loss":0.3}}\n',
]
WHOLE = {
    0: {"val/accuracy": 0.1},
    1: {"actor/loss": 0.4, "actor/grad_norm": None, "timing_s/step": 7.0},
    2: {"actor/loss": 0.3},
}


def test_lines_of_a_step_add_up(paths: RunPaths) -> None:
    paths.metrics(1).write_bytes(b"".join(LINES))
    assert read_metrics(paths, 1) == WHOLE
    assert read_metrics(paths, 2) == {}


def test_a_last_line_cut_short_anywhere_is_left_out(paths: RunPaths) -> None:
    for length in range(len(LINES[3]) - 1):
        paths.metrics(1).write_bytes(b"".join(LINES[:3]) + LINES[3][:length])
        assert read_metrics(paths, 1) == {step: WHOLE[step] for step in (0, 1)}
    paths.metrics(1).write_bytes(b"".join(LINES).rstrip(b"\n"))
    assert read_metrics(paths, 1) == WHOLE


NO_LINES = [
    b"{",
    b"[]",
    b"3",
    b'{"step": 1}',
    b'{"step": "x", "data": {}}',
    b'{"step": 1, "data": 5}',
    b"\xff",
]


@pytest.mark.parametrize("line", NO_LINES)
def test_a_line_before_the_last_that_is_none_is_named(paths: RunPaths, line: bytes) -> None:
    paths.metrics(1).write_bytes(LINES[0] + line + b"\n" + LINES[1])
    with pytest.raises(CorruptError, match="line 2 is not") as error:
        read_metrics(paths, 1)
    assert error.value.path == paths.metrics(1)
