"""The definition of influence written as plainly as its formulas: no hooks, no Gram matrix, no batching.

Each position gets a copy of a layer's weight of its own, so that plain autograd gives the gradient of the
objective through that position alone; a D x D system is solved for every token.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from influence.config import TracerConfig
from influence.projection import projected_widths, projection_matrix
from tests.influence.tiny_model import Response, TinyTransformer, objective, padded

PositionGradients = dict[str, list[Tensor]]
"""By module: for each response the gradients of its positions, [n, d_out, d_in]."""


class _WeightPerPosition(nn.Module):
    """A linear layer whose weight is repeated for each position, as leaves of the graph."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.weights: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight.detach()
        copies = weight.expand(*x.shape[:2], *weight.shape).clone().requires_grad_()
        self.weights.append(copies)
        y = torch.einsum("bsoi,bsi->bso", copies, x)
        return y if self.linear.bias is None else y + self.linear.bias


def position_gradients(
    model: TinyTransformer, responses: list[Response], modules: tuple[str, ...]
) -> PositionGradients:
    """The gradient of the objective through each scored position of each response, one response at a time."""
    gradients: PositionGradients = {}
    for response in responses:
        twin = copy.deepcopy(model)
        split: dict[str, _WeightPerPosition] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in modules:
                parent, _, child = name.rpartition(".")
                split[name] = _WeightPerPosition(twin.get_submodule(name))
                setattr(twin.get_submodule(parent), child, split[name])
        batch = padded([response])
        loss = objective(twin, batch)
        for name, module in split.items():
            calls = torch.autograd.grad(loss, module.weights, retain_graph=True)
            by_position = torch.stack(calls).sum(0)[0]
            gradients.setdefault(name, []).append(by_position[batch.row_ids[0] >= 0])
    return gradients


def projected(gradients: PositionGradients, config: TracerConfig) -> PositionGradients:
    """``P_out g P_in^T``, flattened: [n, D]."""
    result: PositionGradients = {}
    for name, by_response in gradients.items():
        d_out, d_in = by_response[0].shape[1:]
        k_in, k_out = projected_widths(d_in, d_out, config.projection_dim_factor, config.dim_limit)
        P_in = projection_matrix(name, "in", d_in, k_in, config.seed)
        P_out = projection_matrix(name, "out", d_out, k_out, config.seed)
        result[name] = [torch.stack([(P_out @ g @ P_in.T).flatten() for g in gs]) for gs in by_response]
    return result


def dense_scores(
    responses: list[Response], gradients: PositionGradients, config: TracerConfig
) -> dict[int, Tensor]:
    """The scores of every response by row id, from their `position_gradients`."""
    g = projected(gradients, config)
    scores = {r.row_id: torch.zeros(r.num_scores, dtype=torch.float64) for r in responses}
    for name in g:
        G = [g[name][i].sum(0) for i in range(len(responses))]
        D = G[0].numel()
        for i, scored in enumerate(responses):
            group = [j for j, r in enumerate(responses) if config.scope == "batch" or r.group == scored.group]
            others = [j for j in group if not (config.exclude_self and j == i)]
            direction = sum((responses[j].contrast * G[j] for j in others), torch.zeros(D).double())
            H = torch.eye(D, dtype=torch.float64)
            if config.hessian == "response":
                trace = sum(float(G[j] @ G[j]) for j in group)
                size = D if config.damping_mode == "trace_over_dim" else len(group)
                H = config.damping * trace / size * torch.eye(D, dtype=torch.float64)
                for j in others:
                    H = H + torch.outer(G[j], G[j])
            if config.hessian == "token":
                H_of = [sum(torch.outer(gt, gt) for gt in g[name][j]) for j in range(len(responses))]
                scale = sum(float(H_of[j].trace()) for j in group) / D
                if config.damping_mode == "trace_over_responses":
                    scale = sum(float(G[j] @ G[j]) for j in group) / len(group)
                H = sum((H_of[j] for j in others), config.damping * scale * torch.eye(D).double())
            for t in range(scored.num_scores):
                scores[scored.row_id][t] += torch.linalg.solve(H, direction) @ g[name][i][t]
    return scores


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
