"""The semantics of the run that the engine is compared with, slowly: loops, and a D x D system a module.

Written from the run's definition alone. Of the package it uses the projections and nothing else, because
which signs are drawn is a convention and no part of what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from influence.projection import projection_matrix

Array = NDArray[np.float64]

FACTOR = 256
DAMPING = 0.1
SEED = 0


@dataclass(frozen=True)
class ReferenceResponse:
    """A response of T tokens as layers see it; by module: inputs [T, d_in], output gradients [T, d_out]."""

    prompt: int
    is_accepted: bool
    inputs: dict[str, Array]
    output_gradients: dict[str, Array]


def reference_scores(responses: Sequence[ReferenceResponse]) -> list[Array | None]:
    """One score for every token of every response; None for those whose prompt has nothing to contrast."""
    scores: list[Array | None] = []
    for response in responses:
        group = [other for other in responses if other.prompt == response.prompt]
        verdicts = {other.is_accepted for other in group}
        scores.append(_scores_of(response, group) if len(verdicts) == 2 else None)
    return scores


def _scores_of(response: ReferenceResponse, group: Sequence[ReferenceResponse]) -> Array:
    num_tokens = len(next(iter(response.inputs.values())))
    scores = np.zeros(num_tokens)
    for name in response.inputs:
        weights = np.linalg.solve(_hessian(name, group), _direction(name, group))
        for t, gradient in enumerate(_token_gradients(name, response)):
            scores[t] += gradient @ weights
    return scores


def _direction(name: str, group: Sequence[ReferenceResponse]) -> Array:
    """What the accepted responses add up to, less what the rejected do."""
    accepted = [_response_gradient(name, member) for member in group if member.is_accepted]
    rejected = [_response_gradient(name, member) for member in group if not member.is_accepted]
    total: Array = np.sum(accepted, axis=0) - np.sum(rejected, axis=0)
    return total


def _hessian(name: str, group: Sequence[ReferenceResponse]) -> Array:
    gradients = [_response_gradient(name, member) for member in group]
    dim = len(gradients[0])
    hessian = np.zeros((dim, dim))
    for gradient in gradients:
        hessian += np.outer(gradient, gradient)
    return hessian + DAMPING * np.trace(hessian) / dim * np.eye(dim)


def _response_gradient(name: str, response: ReferenceResponse) -> Array:
    total: Array = np.sum(_token_gradients(name, response), axis=0)
    return total


def _token_gradients(name: str, response: ReferenceResponse) -> list[Array]:
    inputs, deltas = response.inputs[name], response.output_gradients[name]
    P_in = _projection(name, "in", inputs.shape[1])
    P_out = _projection(name, "out", deltas.shape[1])
    return [np.outer(P_out @ delta, P_in @ x).ravel() for x, delta in zip(inputs, deltas, strict=True)]


@cache
def _projection(name: str, side: str, width: int) -> Array:
    k = max(1, width // FACTOR)
    matrix: Array = projection_matrix(name, side, width, k, SEED).numpy()  # type: ignore[arg-type]
    return matrix
