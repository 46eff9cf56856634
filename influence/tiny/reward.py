"""The verifiable reward of the arithmetic data, as verl loads it from this file's path.

verl executes the file under a module name of its own, so imports here are absolute.
"""

from __future__ import annotations

from typing import Any

from influence.tiny.arithmetic import stated_answer


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_unused: Any
) -> float:
    """1.0 where the response ends with the right sum, else 0.0."""
    return float(stated_answer(solution_str) == int(ground_truth))
