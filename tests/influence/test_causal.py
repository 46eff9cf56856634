"""A score predicts what really happens: the change of the objective after a step along the token.

The score of token t is ``<d, H^-1 g_t>``: to first order the change of ``sum_r c_r L_r`` when the weights
make the step ``P_out^T unvec(H^-1 g_t) P_in``, the token's gradient preconditioned by the group's curvature.
The steps are real, with one length factor for all tokens, and the objective is evaluated anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from influence import TracerConfig
from influence.projection import projection_matrix
from tests.influence.brute_force import position_gradients, projected
from tests.influence.tiny_model import Response, TinyTransformer, make_responses, objective, padded
from tests.influence.tracing import trace

LARGEST_STEP = 0.01
"""Of the longest step, relative to the norm of all traced weights."""


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def steps_along_tokens(
    model: TinyTransformer, responses: list[Response], config: TracerConfig
) -> list[dict[str, Tensor]]:
    """By token of all responses in turn: what it adds to each weight."""
    gradients = projected(position_gradients(model, responses, config.modules), config)
    num_tokens = sum(r.num_scores for r in responses)
    steps: list[dict[str, Tensor]] = [{} for _ in range(num_tokens)]
    for name, by_response in gradients.items():
        G = torch.stack([g.sum(0) for g in by_response])
        num_rows, dim = G.shape
        H = torch.eye(dim, dtype=torch.float64)
        if config.hessian == "response":
            size = num_rows if config.damping_mode == "trace_over_responses" else dim
            H = G.T @ G + config.damping * (G * G).sum() / size * H
        elif config.hessian == "token":
            H = (
                torch.cat(by_response).T @ torch.cat(by_response)
                + config.damping * (G * G).sum() / num_rows * H
            )
        d_out, d_in = model.get_submodule(name).weight.shape
        P_in = projection_matrix(name, "in", d_in, d_in, config.seed)
        P_out = projection_matrix(name, "out", d_out, d_out, config.seed)
        preconditioned = torch.linalg.solve(H, torch.cat(by_response).T).T
        for step, h in zip(steps, preconditioned, strict=True):
            step[name] = P_out.T @ h.reshape(d_out, d_in) @ P_in
    return steps


def changes_of_objective(
    model: TinyTransformer, responses: list[Response], steps: list[dict[str, Tensor]]
) -> Tensor:
    # The objective of a response is its log-probability, so contrasts can be given as advantages.
    batch = padded([replace(r, advantage=r.contrast) for r in responses])
    weights = {name: model.get_submodule(name).weight for name in steps[0]}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    length = norm(before) * LARGEST_STEP / max(norm(step) for step in steps)
    changes = []
    with torch.no_grad():
        start = objective(model, batch)
        for step in steps:
            for name, weight in weights.items():
                weight.copy_(before[name] + length * step[name])
            changes.append(objective(model, batch) - start)
        for name, weight in weights.items():
            weight.copy_(before[name])
    return torch.stack(changes)


def norm(tensors: dict[str, Tensor]) -> float:
    return float(sum((tensor**2).sum() for tensor in tensors.values()) ** 0.5)


def rank_correlation(responses: list[Response], **options: object) -> float:
    """How well (Spearman) the scores of one group rank the changes that steps along its tokens make."""
    model = TinyTransformer(width=32, hidden=48, kv_width=16, seed=1)
    config = TracerConfig(
        objective="log_prob",
        contrast="accepted_minus_rejected",
        exclude_self=False,
        projection_dim_factor=1,
        **options,
    )
    rows = trace(model, [responses], config)
    scores = torch.cat([rows[r.row_id].scores for r in responses])
    steps = steps_along_tokens(model, responses, config)
    return spearman(scores, changes_of_objective(model, responses, steps))


@pytest.fixture(scope="module")
def prediction() -> Callable[..., float]:
    # Prompts of one token: every position that the weights act on is then a scored one.
    responses = [
        replace(r, tokens=r.tokens[r.prompt_length - 1 :], prompt_length=1, advantage=1.0)
        for r in make_responses(num_responses=8, num_groups=1, seed=1)
    ]
    return partial(rank_correlation, responses)


def test_default_damping_predicts_the_change(prediction: Callable[..., float]) -> None:
    assert prediction() >= 0.99


def test_identity_predicts_the_change(prediction: Callable[..., float]) -> None:
    assert prediction(hessian="identity") >= 0.99


def test_the_curvature_of_positions_predicts_the_change(prediction: Callable[..., float]) -> None:
    assert prediction(hessian="token") >= 0.99


@pytest.mark.filterwarnings("ignore:.*effective degrees of freedom")
def test_trace_over_dim_does_not_with_more_dimensions_than_responses(
    prediction: Callable[..., float],
) -> None:
    # Almost the whole step lies outside the span of the responses' gradients, where nothing is predicted and
    # 1/lambda is large; so the test above can fail.
    assert prediction(damping_mode="trace_over_dim") < 0.5
