"""One micro-batch of the actor update: verl's own forward and backward, and the capture of the traced
objective.

Four ways to capture, by ``influence.capture``; the training pass is verl's own in each:

* ``fused``: during the backward of verl's loss, where that is exact (`influence.verl_engine.fused`). No
  extra pass.
* ``shared``: a backward of the objective over the graph of the training forward, before verl's own.
* ``separate``: a forward and a backward of the objective after verl's own, with the weights not yet updated.
* ``auto``: ``fused`` where it is exact, else ``shared``, or ``separate`` where verl's head overwrites what
  a second backward would need.

The backward of an objective computes no gradient of a weight and touches no ``.grad``, and an extra forward
gives the random numbers back that it drew. All ranks go the same way in each micro-batch, because each pass
gathers the sharded weights: they agree by one small reduction.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional

from influence.capture import CaptureError
from influence.timing import Stopwatch
from influence.tracer import InfluenceTracer
from influence.verl_engine.fused import (
    FUSED,
    REASONS,
    SEPARATE,
    SHARED,
    WAYS,
    HeadGradients,
    Verdict,
    judge,
    measure,
    tolerance,
)
from influence.verl_engine.rows import NOT_CAPTURED, packed_weights

IN_PLACE: Final = "in_place_cross_entropy"
"""Why ``auto`` goes from ``shared`` on to ``separate``."""

COUNTS: Final = (
    *(f"{way}_rows" for way in WAYS),
    "on_policy_rows",
    *(f"fallback_{reason}" for reason in (*REASONS, IN_PLACE)),
)
"""What `CapturePass.pop_counts` counts: rows, and micro-batches that fell back by reason."""

_STAND_IN_ROW = 2**62
"""Row id of a micro-batch without captured rows, where other ranks have some: recorded, then dropped."""

LossFunction = Callable[..., tuple[Tensor, dict[str, Any]]]
Forward = Callable[[LossFunction], tuple[Tensor, dict[str, Any]]]


class CapturePass:
    """Runs the micro-batches of the actor update, with the capture that suits each."""

    def __init__(
        self,
        tracer: InfluenceTracer,
        watch: Stopwatch,
        compute_dtype: torch.dtype,
        device: torch.device,
        process_group: dist.ProcessGroup | None,
        gradients_unreduced: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """As the engine has it.

        Args:
            compute_dtype: what the model's layers compute in.
            gradients_unreduced: a context in which a backward reduces no gradients over the ranks.
        """
        self._tracer = tracer
        self._config = tracer.config
        self._watch = watch
        self._tolerance = tolerance(compute_dtype)
        self._device = device
        self._process_group = process_group
        self._gradients_unreduced = gradients_unreduced
        self._counts = Counter(dict.fromkeys(COUNTS, 0))
        self.mean_ratio: dict[int, float] = {}
        """By row id, of all rows since it was last cleared: mean ratio of the new to the old policy."""

    def run(
        self,
        data: Any,
        row_ids: Sequence[int],
        grid: Tensor,
        forward: Forward,
        loss_function: LossFunction,
    ) -> dict[str, Any]:
        """Train on a micro-batch, backward included, and capture it; what verl's forward puts out.

        Args:
            row_ids: an id a sequence, -1 for those left out.
            grid: the rows of the model's tokens, for `InfluenceTracer.capture`.
            forward: verl's forward of this micro-batch, given a loss function.

        Raises:
            CaptureError: ``influence.capture`` names a way that would not be right here.
        """
        is_stand_in = not bool((grid >= 0).any())
        if is_stand_in:
            grid = torch.full_like(grid, NOT_CAPTURED)
            grid[0, 0] = _STAND_IN_ROW
        num_rows = 0 if is_stand_in else int(torch.unique(grid[grid >= 0]).numel())
        asked = self._config.capture
        if asked == SHARED and (why := in_place_cross_entropy(data)):
            raise CaptureError(
                f"influence.capture: shared would give wrong scores here, because {why}; or use capture: auto"
            )
        if asked == SEPARATE:
            head = _Head(loss_function)
            loss, output = self._forward(forward, head)
            self._judge(head, loss, data, row_ids)
            self._backward(loss)
            way = SEPARATE
        else:
            way, output = self._train_in_capture(data, row_ids, grid, forward, loss_function, is_stand_in)
        if way == SEPARATE:
            self._extra_pass(data, grid, forward, loss_function, is_stand_in)
        self._counts[f"{way}_rows"] += num_rows
        return output

    def train_only(self, forward: Forward, loss_function: LossFunction) -> dict[str, Any]:
        """Train on a micro-batch whose rows an earlier epoch captured; what verl's forward puts out."""
        with self._watch.span("forward_2"):
            loss, output = forward(loss_function)
        self._backward(loss)
        return output

    def pop_counts(self) -> dict[str, int]:
        """`COUNTS` of this rank since the last call."""
        counts, self._counts = self._counts, Counter(dict.fromkeys(COUNTS, 0))
        return {name: counts[name] for name in COUNTS}

    def _train_in_capture(
        self,
        data: Any,
        row_ids: Sequence[int],
        grid: Tensor,
        forward: Forward,
        loss_function: LossFunction,
        is_stand_in: bool,
    ) -> tuple[str, dict[str, Any]]:
        head = _Head(loss_function)
        with self._tracer.capture(grid) as handle:
            with self._watch.span("captured_training"):
                loss, output = self._forward(forward, head)
            verdict = self._judge(head, loss, data, row_ids)
            way = self._way(verdict, data)
            if way == FUSED:
                handle.gradient_scale = verdict.gradient_scale or {_STAND_IN_ROW: 1.0}
                with self._watch.span("captured_training"):
                    self._backward(loss)
            elif way == SHARED:
                with self._watch.span("logprob_backward"), self._gradients_unreduced():
                    handle.backward(self._objective(loss, head.log_probs, data), retain_graph=True)
            if is_stand_in or way == SEPARATE:
                handle.discard()
        if way != FUSED:
            self._backward(loss)
        return way, output

    def _extra_pass(
        self, data: Any, grid: Tensor, forward: Forward, loss_function: LossFunction, is_stand_in: bool
    ) -> None:
        def objective(model_output: dict[str, Any], data: Any, dp_group: Any = None) -> tuple[Tensor, Any]:
            loss = torch.zeros(())
            if self._config.objective == "training_loss":
                loss, _ = loss_function(model_output=model_output, data=data, dp_group=dp_group)
            return self._objective(loss, model_output["log_probs"], data), {}

        devices = [torch.cuda.current_device()] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self._tracer.capture(grid) as handle:
            with self._watch.span("forward_1"):
                value, _ = forward(objective)
            with self._watch.span("logprob_backward"), self._gradients_unreduced():
                handle.backward(value)
            if is_stand_in:
                handle.discard()

    def _forward(self, forward: Forward, head: _Head) -> tuple[Tensor, dict[str, Any]]:
        with self._watch.span("forward_2"):
            return forward(head)

    def _backward(self, loss: Tensor) -> None:
        with self._watch.span("loss_backward"):
            loss.backward()

    def _judge(self, head: _Head, loss: Tensor, data: Any, row_ids: Sequence[int]) -> Verdict:
        verdict = judge(head.gradients(loss), data, row_ids, self._config.objective, self._tolerance)
        self.mean_ratio |= verdict.mean_ratio
        self._counts["on_policy_rows"] += verdict.num_on_policy
        return verdict

    def _way(self, verdict: Verdict, data: Any) -> str:
        """How this micro-batch is captured, the same on every rank; counts a fall-back and its reason.

        Raises:
            CaptureError: ``fused`` was asked for, and is inexact on some rank.
        """
        asked = self._config.capture
        if asked == SHARED:
            return SHARED
        is_exact = self._on_all_ranks(verdict.reason is None)
        if is_exact:
            return FUSED
        if asked == FUSED:
            reason = verdict.reason or "another rank's rows"
            raise CaptureError(
                f"influence.capture: fused is not exact in this micro-batch ({reason}): the training "
                "loss's gradient is no row-wise multiple of the objective's; use capture: auto, which falls "
                "back where it must"
            )
        if verdict.reason is not None:
            self._counts[f"fallback_{verdict.reason}"] += 1
        if in_place_cross_entropy(data):
            self._counts[f"fallback_{IN_PLACE}"] += 1
            return SEPARATE
        return SHARED

    def _on_all_ranks(self, holds: bool) -> bool:
        if self._process_group is None:
            return holds
        flag = torch.tensor(int(holds), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self._process_group)
        return bool(flag)

    def _objective(self, loss: Tensor, log_probs: Tensor, data: Any) -> Tensor:
        """``sum_t weight_t log pi_t`` of a micro-batch, or verl's loss itself."""
        if self._config.objective == "training_loss":
            return loss
        log_probs_T = log_probs.values()
        weights_T = packed_weights(data, self._config.objective).to(log_probs_T.device)
        return (log_probs_T.float() * weights_T).sum()


class _Head:
    """verl's loss function, remembering what it was given."""

    def __init__(self, loss_function: LossFunction) -> None:
        self._loss_function = loss_function
        self._model_output: dict[str, Any] = {}

    def __call__(self, model_output: dict[str, Any], **arguments: Any) -> tuple[Tensor, dict[str, Any]]:
        self._model_output = dict(model_output)
        return self._loss_function(model_output=model_output, **arguments)

    @property
    def log_probs(self) -> Tensor:
        log_probs = self._model_output["log_probs"]
        assert isinstance(log_probs, Tensor)  # noqa: S101  (verl's language model engine)
        return log_probs

    def gradients(self, loss: Tensor) -> HeadGradients:
        return measure(loss, self._model_output)


def in_place_cross_entropy(data: Any) -> str | None:
    """Why a second backward over this micro-batch's graph would be silently wrong; None where it is right.

    Flash-attention's cross entropy writes the gradient over the logits that it saved; verl lets it wherever
    it computes no entropy from them, and always for padded batches.
    """
    is_available = getattr(torch_functional, "FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE", True)
    if not is_available or os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") == "1":
        return None
    is_packed = tu.get_non_tensor_data(data, key="use_remove_padding", default=True)
    if not is_packed:
        return (
            "flash-attention's cross entropy overwrites the logits: set VERL_DISABLE_FLASH_ATTN_CE=1, or "
            "model.use_remove_padding and actor_rollout_ref.actor.calculate_entropy to true"
        )
    if not tu.get_non_tensor_data(data, key="calculate_entropy", default=False):
        return (
            "flash-attention's cross entropy overwrites the logits: set "
            "actor_rollout_ref.actor.calculate_entropy to true, or VERL_DISABLE_FLASH_ATTN_CE=1"
        )
    return None
