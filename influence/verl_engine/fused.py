"""Can a micro-batch's training loss stand in for the traced objective? Read off its actual gradient.

The objective is ``sum_t w_t log pi_t``. verl's loss is some function of the log-probabilities, and what its
backward sends into the model is ``c_t = d loss / d log pi_t``. Where in every row ``c_t = a_r w_t`` with
one number ``a_r`` (for the clipped policy loss at ratio 1: minus the weight that the loss aggregation gives
the row), and where the loss depends on the model in no other way, the loss's own backward captures the
objective's gradient times ``a_r``. Nothing is inferred from settings: the ``c_t`` are measured, by a
backward that ends at the log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from influence.verl_engine.rows import predicting_positions

FUSED: Final = "fused"
SHARED: Final = "shared"
SEPARATE: Final = "separate"
WAYS: Final = (FUSED, SHARED, SEPARATE)
"""How a micro-batch was captured; see `influence.verl_engine.capture_pass`."""

OTHER_PATH: Final = "other_path"
"""The loss reaches the model's weights otherwise than through what its head puts out."""
ENTROPY: Final = "entropy"
"""The loss depends on the entropy."""
OFF_POLICY: Final = "off_policy"
"""Some row's policy differs from the one that the old log-probabilities belong to."""
LOSS_TERMS: Final = "loss_terms"
"""On policy, and yet another gradient: a KL loss, importance weights, another policy loss."""
ZERO_ADVANTAGE: Final = "zero_advantage"
"""Under ``log_prob`` a row with advantage 0: the loss's gradient of it is 0, the objective's is not."""

REASONS: Final = (OTHER_PATH, ENTROPY, OFF_POLICY, LOSS_TERMS, ZERO_ADVANTAGE)
"""Why a loss cannot stand in; of several that hold, the first is told."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadGradients:
    """How a micro-batch's loss depends on what the model's head puts out (T tokens, packed)."""

    log_probs: Tensor
    """[T] ``log pi_t``, detached."""
    coefficients: Tensor
    """[T] ``c_t = d loss / d log pi_t``."""
    obstacle: str | None
    """`OTHER_PATH`, `ENTROPY` or `LOSS_TERMS` where the loss depends on more than the log-probabilities."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a micro-batch's coefficients say; rows by id."""

    reason: str | None
    """One of `REASONS`; None: the loss's backward captures the objective's gradient exactly."""
    gradient_scale: Mapping[int, float]
    """``1 / a_r``: the captured gradient of the loss times this is the objective's."""
    mean_ratio: Mapping[int, float]
    """Mean of ``exp(log pi - old log pi)`` over a row's own tokens."""
    num_on_policy: int
    """Rows with ratio 1 at every own token, and none of them clipped."""


def tolerance(compute_dtype: torch.dtype) -> float:
    """How far, relatively, ``c_t`` may be from ``a_r w_t``: what rounding alone does to it.

    Float32: the log-probability of the old and of the training pass are sums over different micro-batches,
    each right to some units of 6e-8 times its size (about 10); their difference is what the ratio departs
    from 1 by. 1e-5 covers that, and is far below one step of any optimizer that does anything. A model that
    computes in bfloat16 rounds the very next gradient, ``c_t (1 - p_t)``, by up to 2^-9, and so are its
    captured factors: less than that cannot show in a score.
    """
    return 2.0**-9 if compute_dtype == torch.bfloat16 else 1e-5


def measure(loss: Tensor, model_output: Mapping[str, Any]) -> HeadGradients:
    """The coefficients of verl's loss in one micro-batch; its graph stays whole.

    Args:
        model_output: what verl's loss function was given; jagged columns of T tokens, ``log_probs`` for one.
    """
    outputs = {
        name: value
        for name, value in model_output.items()
        if isinstance(value, Tensor) and value.requires_grad
    }
    gradients = dict(
        zip(
            outputs,
            torch.autograd.grad(loss, list(outputs.values()), retain_graph=True, allow_unused=True),
            strict=True,
        )
    )
    log_probs = _values(model_output["log_probs"]).detach()
    gradient = gradients.pop("log_probs")
    coefficients = torch.zeros_like(log_probs) if gradient is None else _values(gradient)
    used = [name for name, g in gradients.items() if g is not None and bool(_values(g).any())]
    obstacle = None
    if _reaches_weights(loss, outputs.values()):
        obstacle = OTHER_PATH
    elif used:
        obstacle = ENTROPY if "entropy" in used else LOSS_TERMS
    return HeadGradients(log_probs, coefficients, obstacle)


@torch.no_grad()
def judge(
    head: HeadGradients, data: Any, row_ids: Sequence[int], objective: str, relative_tolerance: float
) -> Verdict:
    """Compare the coefficients with the weights of the objective, row by row.

    Every token of a row's sequence counts, also prompt tokens and those that the policy did not generate,
    whose weight is 0. A row without own tokens or without an id (-1) is not judged. With ``training_loss``
    the loss is the objective, and every gradient_scale 1: verl's loss as its backward sees it, which is
    minimized and carries the factors of its aggregation and of averaging over ranks.

    Args:
        data: the micro-batch, with jagged ``input_ids``, ``prompts``, ``responses``, ``response_mask``,
            ``advantages``, ``old_log_probs``.
        row_ids: an id a sequence.
    """
    device = head.log_probs.device
    lengths = data["input_ids"].offsets().diff().to(device)
    row_T = torch.repeat_interleave(torch.arange(lengths.numel(), device=device), lengths)
    own_T, advantage_T, old_T = _packed(data, device)
    c_T = head.coefficients.double()
    ratio_T = (own_T * head.log_probs.double() - old_T).exp()
    weight_T = own_T if objective == "log_prob" else advantage_T

    def per_row(*columns_T: Tensor) -> Tensor:
        table_Tk = torch.stack([column.double() for column in columns_T], dim=1)
        return torch.segment_reduce(table_Tk, "sum", lengths=lengths, axis=0, unsafe=True)

    sums = per_row(c_T * weight_T, weight_T**2)
    factor = sums[:, 0] / torch.where(sums[:, 1] > 0, sums[:, 1], 1.0)
    wanted_T = factor[row_T] * weight_T
    # Negated, so that a coefficient that is not a number does not pass.
    is_wrong_T = ~((c_T - wanted_T).abs() <= relative_tolerance * wanted_T.abs())
    is_off_T = ~((ratio_T - 1).abs() <= relative_tolerance)
    is_clipped_T = (c_T == 0) & (advantage_T != 0)
    counts = per_row(own_T, own_T * ratio_T, c_T.abs(), advantage_T.abs(), is_wrong_T, is_off_T, is_clipped_T)
    table = torch.cat([counts, sums[:, 1:], factor[:, None]], dim=1).tolist()
    reasons, scales, ratios, num_on_policy = {head.obstacle}, {}, {}, 0
    for row_id, (own, ratio, gradient, advantage, wrong, off, clipped, size, a) in zip(
        row_ids, table, strict=True
    ):
        if row_id < 0 or own == 0:
            continue
        ratios[row_id] = ratio / own
        num_on_policy += off == 0 and clipped == 0
        scales[row_id] = 1.0 / a if size > 0 and a != 0 else 1.0
        if wrong or (size > 0 and a == 0):
            is_silent = advantage == 0 and gradient == 0
            reasons.add(ZERO_ADVANTAGE if is_silent else OFF_POLICY if off else LOSS_TERMS)
    if objective == "training_loss":
        return Verdict(None, dict.fromkeys(ratios, 1.0), ratios, num_on_policy)
    reason = next((reason for reason in REASONS if reason in reasons), None)
    return Verdict(reason, scales, ratios, num_on_policy)


def _packed(data: Any, device: torch.device) -> Tensor:
    """Mask, advantages and old log-probabilities of the policy's own tokens, float64 [3, T]; 0 elsewhere."""
    mask, advantages, old = (
        data[name].values().to(device, torch.float64)
        for name in ("response_mask", "advantages", "old_log_probs")
    )
    packed = torch.zeros(3, data["input_ids"].values().shape[0], dtype=torch.float64, device=device)
    packed[:, predicting_positions(data).to(device)] = mask * torch.stack(
        [torch.ones_like(mask), advantages, old]
    )
    return packed


def _values(column: Tensor) -> Tensor:
    return column.values() if column.is_nested else column


def _reaches_weights(loss: Tensor, outputs: Any) -> bool:
    """Does the graph from the loss, cut at these outputs, still end in a parameter?"""
    seen = {output.grad_fn for output in outputs}
    pending = [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::AccumulateGrad":
            return True
        seen.add(node)
        pending += [following for following, _ in node.next_functions]
    return False
