"""Weights of the responses of a group, from the R x R Gram matrix of their gradients.

With ``g_r = vec(G_r)`` in R^D, ``K = [<g_r, g_s>]``, direction ``d = sum_r c_r g_r`` and curvature
``H = sum_r g_r g_r^T + lambda I``, the push-through identity gives

    H^-1 d = sum_r alpha_r g_r      with      alpha = (K + lambda I)^-1 c,

so the D x D matrix is never formed, and what a group costs does not depend on its number of tokens.
Everything here is float64 and works on any leading dimensions (modules, groups).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DualSolution:
    """The weights of a group's responses, by the response that is scored."""

    alpha: Tensor
    """[..., S, R]: to score response s, ``M_s = sum_r alpha_sr G_r``."""
    effective_dof: Tensor
    """[...]: ``tr(K (K + lambda I)^-1)``: how many of the R responses the curvature fits exactly."""
    used_floor: Tensor
    """[...] bool: Cholesky failed, and eigenvalues were raised to a floor."""


def response_gram(G_RD: Tensor) -> Tensor:
    """``K = G G^T`` in float64, [..., R, R], of the flattened gradients [..., R, D]."""
    G_RD = G_RD.to(torch.float64)
    return G_RD @ G_RD.mT


def damping_strength(K_RR: Tensor, num_rows: Tensor, dim: Tensor, damping: float, mode: str) -> Tensor:
    """lambda, [...]: ``damping tr(K) / R`` (trace_over_responses) or ``damping tr(H) / D`` (trace_over_dim).

    tr(K) = tr(H) before damping. It is the whole group's, also where the scored response is left out.
    `num_rows` counts the responses and `dim` is D, both [...].
    """
    trace = K_RR.diagonal(dim1=-2, dim2=-1).sum(-1)
    return damping * trace / (num_rows.clamp(min=1) if mode == "trace_over_responses" else dim)


def dual_weights(
    K_RR: Tensor, contrast_R: Tensor, damping: Tensor, exclude_self: bool, *, floor_failures: bool = True
) -> DualSolution:
    """Solve ``(K + lambda I) alpha = c`` for K [..., R, R], c [..., R] and lambda [...].

    With `exclude_self` response s is left out of direction and curvature. With ``B = (K + lambda I)^-1`` and
    ``a = B c``, the block inverse gives the smaller system's solution without another solve:

        alpha_s = a - B[:, s] a_s / B_ss,       whose own component is a_s - B_ss a_s / B_ss = 0.

    Where K is zero there is nothing to weight, and alpha is zero. Flooring eigenvalues where Cholesky fails
    makes the host wait; without `floor_failures` those systems' alpha means nothing, and `used_floor` names
    them.
    """
    num_rows = K_RR.shape[-1]
    inverse, failed = damped_inverse(K_RR.reshape(-1, num_rows, num_rows), damping.reshape(-1))
    B_RR, used_floor = inverse.view(K_RR.shape), failed.view(damping.shape)
    if floor_failures and bool(used_floor.any()):
        B_RR = _floored_where(used_floor, K_RR, damping, B_RR)
    a_R = (B_RR @ contrast_R.unsqueeze(-1)).squeeze(-1)
    diagonal = B_RR.diagonal(dim1=-2, dim2=-1)
    alpha_SR = a_R.unsqueeze(-2).expand(K_RR.shape)
    if exclude_self:
        ratio_S = torch.where(diagonal > 0, a_R / diagonal, 0.0)
        alpha_SR = _without_self(alpha_SR - ratio_S.unsqueeze(-1) * B_RR)
    effective_dof = num_rows - damping * diagonal.sum(-1)
    return DualSolution(alpha_SR, torch.where(damping > 0, effective_dof, 0.0), used_floor)


def damped_inverse(gram_BRR: Tensor, damping_B: Tensor) -> tuple[Tensor, Tensor]:
    """``(K + lambda I)^-1`` of B symmetric systems [B, R, R], and which of them are not positive definite.

    Where lambda is not above zero, the system has no direction: its inverse is zero, and it did not fail. The
    inverse of a failed system is zero, too. By a batched Cholesky factorization.
    """
    has_direction = damping_B > 0
    eye = torch.eye(gram_BRR.shape[-1], dtype=gram_BRR.dtype, device=gram_BRR.device)
    damped = gram_BRR + torch.where(has_direction, damping_B, 1.0)[:, None, None] * eye
    factor, info = torch.linalg.cholesky_ex(damped)
    is_solved = has_direction & (info == 0)
    inverse = torch.cholesky_inverse(torch.where(is_solved[:, None, None], factor, eye))
    return inverse.mul_(is_solved[:, None, None]), has_direction & ~is_solved


def identity_weights(contrast_R: Tensor, exclude_self: bool) -> Tensor:
    """alpha for ``H = I``: the contrasts themselves, [..., S, R]."""
    num_rows = contrast_R.shape[-1]
    alpha_SR = contrast_R.unsqueeze(-2).expand(*contrast_R.shape[:-1], num_rows, num_rows)
    return _without_self(alpha_SR) if exclude_self else alpha_SR


def _without_self(alpha_SR: Tensor) -> Tensor:
    own = torch.eye(alpha_SR.shape[-1], dtype=torch.bool, device=alpha_SR.device)
    return alpha_SR.masked_fill(own, 0.0)


def _floored_where(failed: Tensor, K_RR: Tensor, damping: Tensor, B_RR: Tensor) -> Tensor:
    eye = torch.eye(K_RR.shape[-1], dtype=K_RR.dtype, device=K_RR.device)
    damped = K_RR[failed] + damping[failed][..., None, None] * eye
    return B_RR.index_put((failed,), floored_inverse(damped))


def floored_inverse(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    floor = values.amax(-1, keepdim=True) * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    inverse: Tensor = (vectors / values.maximum(floor).unsqueeze(-2)) @ vectors.mT
    return inverse
