"""verl's FSDP engine with the tracer in it; registered for every language model by importing this module.

Each mini-batch of the actor update is run twice: first forward and backward of the objective that is traced,
whose gradients are thrown away, then verl's own training pass, untouched. With a step's last mini-batch its
rows are scored and the step is committed, before verl saves a checkpoint of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name
from verl.utils.metric import AggregationType, Metric
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

from influence.timing import Stopwatch
from influence.tracer import COUNTERS, InfluenceTracer
from influence.verl_engine.output import RunOutput
from influence.verl_engine.rows import as_model_grid, packed_row_ids, packed_weights, read_rows
from influence.verl_engine.step_rows import StepRows

STEP_KEY = "influence_step"
"""The training step, which `influence.verl_engine.trainer` passes along with the batch."""

_ROW_ID = "influence_row_id"


class InfluenceEngine(FSDPEngineWithLMHead):
    """Traces the actor update; a reference model (``forward_only``) is left alone."""

    _output: RunOutput | None = None
    _is_capturing = False

    def initialize(self) -> None:
        super().initialize()
        if self.engine_config.forward_only:
            return
        self._output = RunOutput.from_environment()
        self._tracer = InfluenceTracer(self.module, self._output.tracer_config, self._process_group())
        self._watch = Stopwatch(on_gpu=get_device_name() == "cuda")
        self._begin_step()

    def _build_fsdp_module(self, module: Any) -> Any:
        if get_device_name() != "cpu":
            return super()._build_fsdp_module(module)
        from influence.cpu.offload import without_pinned_memory

        with without_pinned_memory():
            return super()._build_fsdp_module(module)

    def _begin_step(self) -> None:
        self._rows = StepRows()
        self._started_s: float | None = None

    def train_batch(self, data: Any, loss_function: Callable[..., Any]) -> Any:
        """One mini-batch; the step's last one also scores and commits, and reports the step's metrics."""
        if self._output is None:
            return super().train_batch(data, loss_function)
        if self._started_s is None:
            self._started_s = time.perf_counter()
        row_ids = self._rows.add(read_rows(data))
        if row_ids is not None:  # a later epoch visits the same rows again
            self._capture(data, row_ids)
        is_last = bool(tu.get_non_tensor_data(data, key="update_lr_scheduler", default=False))
        if is_last:
            # Before the training pass, so that the captured factors do not take its memory.
            scored = self._rows.score(self._tracer, self._process_group())
        outputs = super().train_batch(data, loss_function)
        if is_last:
            step = int(tu.get_non_tensor_data(data, key=STEP_KEY, default=0))
            stats = self._tracer.debug_stats(reset=True)
            counts = {name: stats[name] for name in COUNTERS}
            report = self._output.commit(step, scored, counts, self._timings(), self._process_group())
            outputs["metrics"].update(
                {name: Metric(AggregationType.MAX, value) for name, value in report.as_verl_metrics().items()}
            )
            self._begin_step()
        return outputs

    def _capture(self, data: Any, row_ids: list[int]) -> None:
        """Forward and backward of the traced objective; leaves no gradient and no random number behind."""
        # A column of the batch, so that it follows the rows into micro-batches, however they are composed.
        data[_ROW_ID] = torch.tensor(row_ids)
        devices = [torch.cuda.current_device()] if get_device_name() == "cuda" else []
        self._is_capturing = True
        try:
            with torch.random.fork_rng(devices=devices):
                self.forward_backward_batch(data, self._objective, forward_only=False)
        finally:
            self._is_capturing = False
            self.optimizer_zero_grad()
            del data[_ROW_ID]

    def forward_backward_batch(self, data: Any, loss_function: Any, forward_only: bool = False) -> Any:
        """All micro-batches of a mini-batch; verl's own, timed when it trains."""
        if self._output is None or forward_only or self._is_capturing:
            return super().forward_backward_batch(data, loss_function, forward_only)
        with self._watch.span("training_pass"):
            return super().forward_backward_batch(data, loss_function, forward_only)

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        """A micro-batch's forward; its backward too while capturing: the tracer wants both in one context."""
        if self._output is None or forward_only:
            return super().forward_step(micro_batch, loss_function, forward_only)
        if not self._is_capturing:
            with self._watch.span("forward_2"):
                return super().forward_step(micro_batch, loss_function, forward_only)
        packed = packed_row_ids(micro_batch, micro_batch[_ROW_ID].tolist())
        model_inputs, _ = self.prepare_model_inputs(micro_batch=micro_batch)
        row_ids = as_model_grid(packed, micro_batch, model_inputs["input_ids"].shape)
        with self._tracer.capture(row_ids):
            with self._watch.span("forward_1"):
                loss, output = super().forward_step(micro_batch, loss_function, forward_only)
            with self._watch.span("logprob_backward"):
                loss.backward()
        # verl calls backward on what it gets: something whose backward is nothing.
        return torch.zeros((), device=loss.device, requires_grad=True), output

    def _objective(
        self, model_output: dict[str, Any], data: Any, dp_group: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """``sum_t weight_t log pi_t`` of a micro-batch, in the form of a loss function of verl."""
        assert self._output is not None  # noqa: S101  (only used while capturing)
        log_probs_T = model_output["log_probs"].values()
        weights_T = packed_weights(data, self._output.tracer_config.objective).to(log_probs_T.device)
        return (log_probs_T.float() * weights_T).sum(), {}

    def _process_group(self) -> dist.ProcessGroup | None:
        return self.get_data_parallel_group() if self.get_data_parallel_size() > 1 else None

    def _timings(self) -> dict[str, float]:
        """Seconds of this step on this rank, by the names of the commit record."""
        assert self._started_s is not None  # noqa: S101  (set by the first mini-batch)
        spans, phases = self._watch.pop(), self._tracer.pop_timing()
        training_pass_s = spans.pop("training_pass")
        return {
            **spans,
            **phases,
            "loss_backward": training_pass_s - spans["forward_2"],
            "update_actor": time.perf_counter() - self._started_s,
        }


EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device=["cuda"], vendor=["nvidia"]
)(InfluenceEngine)
EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=["cpu"])(
    InfluenceEngine
)
