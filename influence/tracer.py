"""The tracer: hooks on a model, and from what they captured one score for every captured token."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from influence.capture import ActivationCapture, CaptureError, MicroBatchCapture
from influence.config import InfluenceWarning, TracerConfig
from influence.groups import GatheredRows, GroupPlan, gather_rows, plan_groups
from influence.handle import GradientScale
from influence.kernels import on_device
from influence.launched_weights import launch_row_weights
from influence.micro_batch import MicroBatch, response_dtype
from influence.modules import find_modules
from influence.score import RowScores, emit_rows, plan_scores, score_slots
from influence.staging import HostCopy
from influence.timing import PhaseTimer
from influence.token_hessian import TokenFactors
from influence.weights import RowWeights

COUNTERS: Final = (
    "micro_batches",
    "captured_tokens",
    "rows_emitted",
    "groups",
    "skipped_groups",
    "interpolated_groups",
    "double_sign_groups",
    "solve_floors",
    "nonfinite_drops",
)


class InfluenceTracer:
    """Traces the influence of single tokens during ordinary backward passes of a model.

    ::

        tracer = InfluenceTracer(model, TracerConfig(), process_group=dist.group.WORLD)
        for batch in micro_batches:
            with tracer.capture(batch.row_ids):          # forward AND backward inside
                objective(model, batch).backward()
        rows = tracer.pop_rows(groups, contrast)         # rows[i].scores: one number a captured token

    Without a process group only this process's rows are compared. The hooks do nothing outside of
    ``capture`` and never change a gradient. Under max_tokens_per_response the gradient ``G_r`` of a
    response consists of its selected tokens only, so that its scores still add up to its total.

    A score belongs to a position, not to the loss at that position: see `token_scores`. It predicts, to first
    order, how ``sum_r c_r L_r`` changes when the weights step along the token's gradient preconditioned by
    ``H^-1``.

    Raises TracerConfigError when `config.modules` names something that cannot be traced.
    """

    def __init__(
        self, model: nn.Module, config: TracerConfig, process_group: dist.ProcessGroup | None = None
    ) -> None:
        self.config = config
        self._process_group = process_group
        self._modules, narrowed = find_modules(model, config)
        _warn_of_settings(config, narrowed)  # before the hooks: a filter may make it an error
        self._dtype = response_dtype(self._modules[0].module.weight.dtype)
        self._device = _compute_device(model, process_group)
        self._capture = ActivationCapture(self._modules, self._dtype, config.max_tokens_per_response)
        self._timer = PhaseTimer(self._device, config.profile_timing)
        self._counts = Counter(dict.fromkeys(COUNTERS, 0))
        self._nonfinite: Counter[str] = Counter()
        self._told_interpolation = False

    @property
    def module_names(self) -> tuple[str, ...]:
        """The canonical names of the traced layers."""
        return tuple(module.name for module in self._modules)

    @contextmanager
    def capture(
        self, row_ids: Tensor, gradient_scale: GradientScale | None = None
    ) -> Iterator[MicroBatchCapture]:
        """Capture one micro-batch: run the forward and the backward of the objective inside.

        `row_ids` int64, in the shape of the token grid the model sees, (batch, seq) or packed (1, tokens):
        the row that a token belongs to, -1 where it is not captured. A row's tokens lie in one micro-batch;
        ids are free to choose, and rows come back in their order. Keep `row_ids` on the CPU where possible.
        Nothing is kept of a micro-batch that raises.

        `gradient_scale`, a number for each row, says that the objective's gradient is that of what is
        differentiated inside, times that number: see `MicroBatchCapture`, which the block gets, and which can
        also take the gradients of an objective without any weight's (`backward`) and change its mind
        (`discard`).

        Raises ValueError for another type or shape of row_ids or gradient_scale, and CaptureError when a
        traced layer did not run or got no gradient, sees other tokens than row_ids says, or a row was
        captured before.
        """
        with self._timer.span("capture"), self._capture.record(row_ids, gradient_scale) as micro_batch:
            yield micro_batch

    def pop_rows(self, groups: Sequence[int], contrast: Sequence[float]) -> list[RowScores]:
        """Score the rows captured since the last call and forget them; one entry a row, by increasing row id.

        `groups` and `contrast` have an entry a row in the same order: an id of the row's group, the same on
        every rank (its prompt; unused with scope=batch), and c_r: 1 for contrast=none, +1 or -1 for
        accepted or rejected, or the advantage. Rows of a group without contrast (see `plan_groups`)
        come back with zeros and ``scored=False``. Collective over the process group: every rank calls it,
        also one that has no rows.

        Raises ValueError when the arguments do not fit the captured rows (GatherError on the other ranks)
        and CaptureError inside ``capture``. Whatever is raised, also a warning that a filter makes an error,
        this rank's rows are still there afterwards and nothing is counted: the call can be made again, with a
        process group where all its ranks raise.
        """
        if self._capture.is_open:
            raise CaptureError("pop_rows() inside capture(): end the micro-batch first")
        batches, timer, layout = self._capture.micro_batches, self._timer, self._capture.layout
        with torch.no_grad(), timer.phases("pop_rows") as ended:
            place_of = _places([row_id for batch in batches for row_id in batch.selection.row_ids])
            gradients_nD = self._stage(batches, place_of)
            rows = self._gather(groups, contrast, gradients_nD)
            plan = plan_groups(rows.groups, rows.contrast, rows.local, self.config)
            ended("grad_staging")
            factors = None
            if self.config.hessian == "token":
                factors = TokenFactors.of_micro_batches(batches, place_of, self._process_group)
            launched = launch_row_weights(rows, plan, layout, self.config, factors)
            ended("hessian_solve")
            in_group = np.zeros(place_of.size, dtype=np.bool_)
            in_group[plan.rows_in_groups(rows.local)] = True
            score_plan = plan_scores(batches, place_of, in_group, self._device)
            scores = score_slots(score_plan, launched.matrices, launched.is_finite, layout)
            ended("token_scoring")
            with timer.span("copy_to_host"):
                copy = HostCopy(scores)
            weights = launched.finish()
            if weights.matrices is not launched.matrices:  # a system had to be solved in another way
                copy = HostCopy(score_slots(score_plan, weights.matrices, weights.is_finite, layout))
            emitted = emit_rows(
                batches, place_of, copy.tensor, score_plan.row_slots, weights.total, weights.is_scored
            )
            copy.wait()
            ended("score_aggregation")
        # Last, and the rows are let go after it, since a filter may make a warning an error.
        self._tell(plan, weights)
        self._count(batches, plan, weights)
        self._capture.clear()
        return emitted

    def pop_timing(self) -> dict[str, float]:
        """Seconds by phase since the last call: see `PhaseTimer.pop`. Leaves the counters alone."""
        return self._timer.pop()

    def debug_stats(self, reset: bool = False) -> dict[str, int]:
        """Counts since construction or the last reset, and the number of traced ``modules``.

        A group is counted on the rank of its first row, so that sums over ranks count it once.
        ``nonfinite_drops`` counts pairs of a module and a row whose gradient is not finite, or too large or
        too small for scores to fit their type. Leaves the timings alone.
        """
        stats = {"modules": len(self._modules), **self._counts}
        if reset:
            self._counts = Counter(dict.fromkeys(COUNTERS, 0))
            self._nonfinite.clear()
        return stats

    def nonfinite_modules(self) -> dict[str, int]:
        """How many rows each module lost to values that cannot be scored with, since the last reset."""
        return dict(self._nonfinite)

    def remove(self) -> None:
        """Take the hooks off the model; what was captured can still be popped."""
        self._capture.remove()

    def _gather(self, groups: Sequence[int], contrast: Sequence[float], gradients_nD: Tensor) -> GatheredRows:
        if self._process_group is None:
            return gather_rows(groups, contrast, gradients_nD, None)
        with self._timer.span("all_gather"):
            return gather_rows(groups, contrast, gradients_nD, self._process_group)

    def _stage(self, batches: Sequence[MicroBatch], place_of: NDArray[np.int64]) -> Tensor:
        """The gradients [n, D] of the local rows, by increasing row id."""
        if not batches:
            shape = (0, self._capture.layout.gradient_dim)
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        gradients_nD = torch.cat([batch.gradients for batch in batches])
        if (np.diff(place_of) > 0).all():
            return gradients_nD
        return gradients_nD.index_select(0, on_device(np.argsort(place_of), gradients_nD.device))

    def _count(self, batches: Sequence[MicroBatch], plan: GroupPlan, weights: RowWeights) -> None:
        scored_groups = plan.num_counted - plan.num_counted_skipped
        self._counts.update(
            micro_batches=len(batches),
            captured_tokens=sum(batch.selection.row_offsets[-1] for batch in batches),
            rows_emitted=sum(len(batch.selection.row_ids) for batch in batches),
            groups=plan.num_counted,
            skipped_groups=plan.num_counted_skipped,
            interpolated_groups=weights.num_interpolated,
            double_sign_groups=scored_groups if self.config.counts_advantage_sign_twice else 0,
            solve_floors=weights.num_floors,
            nonfinite_drops=sum(weights.num_dropped),
        )
        self._nonfinite.update(self._dropped(weights))

    def _tell(self, plan: GroupPlan, weights: RowWeights) -> None:
        """Warn of what the scores may lack; of interpolation once."""
        if weights.num_interpolated and not self._told_interpolation:
            self._told_interpolation = True
            scored_groups = plan.num_counted - plan.num_counted_skipped
            _warn(
                f"in {weights.num_interpolated} of {scored_groups} groups the layers with most of the "
                "projected dimensions each give every response scores that add up to its own contrast "
                f"({weights.effective_dof:.2f} effective degrees of freedom for "
                f"{plan.num_counted_rows} responses): a token's score then "
                "hardly predicts what a step along it does. Raise influence.damping, or use "
                "damping_mode: trace_over_responses or exclude_self: true"
            )
        if dropped := self._dropped(weights):
            named = [f"{name} ({count})" for name, count in list(dropped.items())[:5]]
            rest = [f"{len(dropped) - len(named)} more"] if len(dropped) > len(named) else []
            _warn(
                "values that are not finite, or too large or too small to score with: "
                f"dropped {len(dropped)} modules from rows: {', '.join([*named, *rest])}"
            )

    def _dropped(self, weights: RowWeights) -> dict[str, int]:
        """How many rows each module lost; those that lost none are left out."""
        counts = zip(self.module_names, weights.num_dropped, strict=True)
        return {name: count for name, count in counts if count}


def _places(row_ids: Sequence[int]) -> NDArray[np.int64]:
    """The index of each captured row among them all by increasing id."""
    ids = np.asarray(row_ids, dtype=np.int64)
    places = np.empty_like(ids)
    places[np.argsort(ids)] = np.arange(ids.size)
    return places


def _compute_device(model: nn.Module, process_group: dist.ProcessGroup | None) -> torch.device:
    """Where the model computes; its parameters may be offloaded to the CPU at the moment."""
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    if not on_gpu and process_group is not None and torch.cuda.is_available():
        on_gpu = "nccl" in dist.get_backend_config(process_group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _warn_of_settings(config: TracerConfig, narrowed: Sequence[str]) -> None:
    if config.counts_advantage_sign_twice:
        _warn(
            f"objective {config.objective} with contrast {config.contrast} counts the sign of the "
            "advantage twice; use objective: log_prob, or contrast: none"
        )
    if narrowed:
        _warn(
            f"{len(narrowed)} modules, such as {narrowed[0]}, are projected to fewer numbers than "
            f"projection_dim_factor={config.projection_dim_factor} asks for, to keep "
            f"max_hessian_dim={config.max_hessian_dim}; raise it to use more"
        )


def _warn(message: str) -> None:
    warnings.warn(message, InfluenceWarning, stacklevel=4)
