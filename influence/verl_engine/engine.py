"""verl's FSDP engine with the tracer in it; registered for every language model by importing this module.

Each micro-batch of the actor update is captured together with verl's own training pass, which stays what it
is (`influence.verl_engine.capture_pass`). After a step's last mini-batch its rows are scored and the step
is committed, before verl saves a checkpoint of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.metric import AggregationType, Metric
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

from influence.timing import Stopwatch
from influence.tracer import COUNTERS, InfluenceTracer
from influence.verl_engine.capture_pass import CapturePass
from influence.verl_engine.output import RunOutput
from influence.verl_engine.rows import as_model_grid, packed_row_ids, read_rows
from influence.verl_engine.step_rows import StepRows
from influence.verl_engine.support import require_traceable

STEP_KEY = "influence_step"
"""The training step, which `influence.verl_engine.trainer` passes along with the batch."""

_ROW_ID = "influence_row_id"
_CPU = torch.device("cpu")


class InfluenceEngine(FSDPEngineWithLMHead):
    """Traces the actor update; a reference model (``forward_only``) is left alone."""

    _output: RunOutput | None = None

    def initialize(self) -> None:
        """Build the model as verl does, then trace it.

        Raises:
            ConfigurationError: a setting under which the scores would be wrong; names it.
        """
        if self.engine_config.forward_only:
            super().initialize()
            return
        output = RunOutput.from_environment()
        config = output.tracer_config
        require_traceable(self.model_config, self.engine_config, config.capture)
        super().initialize()
        self._output = output
        self._tracer = InfluenceTracer(self.module, config, self._process_group())
        self._watch = Stopwatch(on_gpu=get_device_name() == "cuda")
        self._capture = CapturePass(
            self._tracer,
            self._watch,
            self._autocast_dtype,
            _device(),
            self._process_group(),
            self._gradients_unreduced,
        )
        self._begin_step()

    def _build_fsdp_module(self, module: Any) -> Any:
        if get_device_name() != "cpu":
            return super()._build_fsdp_module(module)
        from influence.cpu.offload import without_pinned_memory

        with without_pinned_memory():
            return super()._build_fsdp_module(module)

    def _begin_step(self) -> None:
        self._rows = StepRows()
        self._capture.mean_ratio.clear()
        self._started_s: float | None = None

    @contextmanager
    def _gradient_sync_context(self, *, is_last_micro_batch: bool) -> Iterator[None]:
        """verl's own, which has the last micro-batch reduce the gradients of all; remembers which it is."""
        with super()._gradient_sync_context(is_last_micro_batch=is_last_micro_batch):
            self._is_last_micro_batch = is_last_micro_batch
            yield

    @contextmanager
    def _gradients_unreduced(self) -> Iterator[None]:
        """Inside, a backward reduces no gradients, not even those that earlier micro-batches accumulated.

        Reduced before the last micro-batch's are added, they would be rounded otherwise than without tracing.
        """
        if self._is_last_micro_batch:
            with super()._gradient_sync_context(is_last_micro_batch=False):
                yield
        else:  # so it is already
            yield

    def train_batch(self, data: Any, loss_function: Callable[..., Any]) -> Any:
        """One mini-batch; the step's last one also scores and commits, and reports the step's metrics."""
        if self._output is None:
            return super().train_batch(data, loss_function)
        if self._started_s is None:
            self._started_s = time.perf_counter()
        row_ids = self._rows.add(read_rows(data))
        if row_ids is None:  # a later epoch visits the same rows again
            outputs = super().train_batch(data, loss_function)
        else:
            # A column of the batch, so that it follows the rows into micro-batches, however they are
            # composed.
            data[_ROW_ID] = torch.tensor(row_ids)
            try:
                outputs = super().train_batch(data, loss_function)
            finally:
                del data[_ROW_ID]
        if bool(tu.get_non_tensor_data(data, key="update_lr_scheduler", default=False)):
            step = int(tu.get_non_tensor_data(data, key=STEP_KEY, default=0))
            outputs["metrics"].update(self._end_step(self._output, step))
        return outputs

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        """A micro-batch's forward; when it trains also its backward, so that both can be in one capture."""
        if self._output is None or forward_only:
            return super().forward_step(micro_batch, loss_function, forward_only)

        def forward(loss: Any) -> Any:
            return super(InfluenceEngine, self).forward_step(micro_batch, loss, False)

        if _ROW_ID in micro_batch.keys():  # noqa: SIM118  (a TensorDict)
            ids = micro_batch[_ROW_ID].tolist()
            packed = packed_row_ids(micro_batch, ids, self._tracer.config.positions)
            model_inputs, _ = self.prepare_model_inputs(micro_batch=micro_batch)
            grid = as_model_grid(packed, micro_batch, model_inputs["input_ids"].shape)
            output = self._capture.run(micro_batch, ids, grid, forward, loss_function)
        else:
            output = self._capture.train_only(forward, loss_function)
        # verl calls backward on what it gets: something whose backward is nothing.
        return torch.zeros((), device=_device(), requires_grad=True), output

    def _end_step(self, run: RunOutput, step: int) -> dict[str, Metric]:
        """Score and commit the step; what verl should log of it. Collective."""
        scored = self._rows.score(self._tracer, self._process_group(), self._capture.mean_ratio)
        stats = self._tracer.debug_stats(reset=True)
        counts = {name: stats[name] for name in COUNTERS} | self._capture.pop_counts()
        report = run.commit(step, scored, counts, self._timings(), self._process_group())
        self._begin_step()
        return {name: Metric(AggregationType.MAX, value) for name, value in report.as_verl_metrics().items()}

    def _process_group(self) -> dist.ProcessGroup | None:
        return self.get_data_parallel_group() if self.get_data_parallel_size() > 1 else None

    def _timings(self) -> dict[str, float]:
        """Seconds of this step on this rank, by the names of the commit record.

        ``forward_2`` and ``loss_backward`` are verl's own pass; ``capture`` is what was done besides, and
        contains ``forward_1`` and ``logprob_backward``, an extra pass's forward and backward. What the
        hooks add to a pass counts to that pass.
        """
        assert self._started_s is not None  # noqa: S101  (set by the first mini-batch)
        spans, phases = self._watch.pop(), self._tracer.pop_timing()
        captured_training_s = spans.pop("captured_training", 0.0)
        if "capture" in phases:
            phases["capture"] = max(0.0, phases["capture"] - captured_training_s)
        return {
            **dict.fromkeys(("forward_1", "logprob_backward", "forward_2", "loss_backward"), 0.0),
            **spans,
            **phases,
            "update_actor": time.perf_counter() - self._started_s,
        }


def _device() -> torch.device:
    return torch.device(get_device_name(), get_device_id()) if get_device_name() != "cpu" else _CPU


EngineRegistry.register(
    model_type="language_model", backend=["fsdp", "fsdp2"], device=["cuda"], vendor=["nvidia"]
)(InfluenceEngine)
EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=["cpu"])(
    InfluenceEngine
)
