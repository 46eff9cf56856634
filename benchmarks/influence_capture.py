"""What the capture adds to a forward and backward: ``fused``, ``shared`` and ``separate`` beside no tracing.

    python benchmarks/influence_capture.py [--json FILE] [--repeats 10] [--tiny]

The model is a 1.5B-shaped Qwen2 with random weights in bfloat16, 2 x 8192 tokens, non-reentrant gradient
checkpointing, SDPA attention. The loss is made of the log-probabilities of the next tokens, a few thousand at
a time and recomputed in the backward, so that no logits of all tokens are held; all variants share it.

* ``no tracing``: a model without hooks. ``hooks idle``: the traced model, outside of ``capture()``; the
  difference says how far the clock can be trusted.
* ``fused``: the training loss's own backward is captured. ``shared``: one forward, a backward of the
  objective as far as the traced layers need it, then the training loss's. ``separate``: a forward and such a
  backward of their own before the training pass.

The variants are timed in turn, and overheads are ratios within a round.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from influence_measure import Times, interleaved, machine, publish, ratio, require_gpu, table
from influence_shapes import REFERENCE, TINY, build_model, random_tokens
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from influence import InfluenceTracer, TracerConfig, estimate_memory

HEAD_TOKENS = 4096
"""Tokens whose logits are held at a time."""


class TrainingPass:
    """A forward and backward of a policy loss, traced in one of the ways or not at all."""

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self.model = model
        self.tokens = tokens
        num_rows, length = tokens.shape
        self.row_ids = torch.arange(num_rows)[:, None].expand(num_rows, length).contiguous()
        self.is_captured = False
        self.advantages = torch.linspace(-1.0, 1.0, num_rows, device=tokens.device)[:, None]

    def log_probs(self) -> Tensor:
        """float32 [rows, length - 1]."""
        hidden = self.model.model(self.tokens).last_hidden_state[:, :-1]
        flat, targets = hidden.flatten(0, 1), self.tokens[:, 1:].flatten()
        parts = [
            checkpoint(self._head, h, t, use_reentrant=False)
            for h, t in zip(flat.split(HEAD_TOKENS), targets.split(HEAD_TOKENS), strict=True)
        ]
        return torch.cat(parts).view(len(self.tokens), -1)

    def _head(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden)
        chosen = logits.gather(1, targets[:, None]).squeeze(1).float()
        return chosen - logits.float().logsumexp(1)

    def _objective(self, log_probs: Tensor) -> Tensor:
        return (self.advantages * log_probs).sum()

    def _loss(self, log_probs: Tensor) -> Tensor:
        return -self._objective(log_probs) / self.tokens.numel()

    def plain(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self._loss(self.log_probs()).backward()

    def fused(self, tracer: InfluenceTracer) -> None:
        self.model.zero_grad(set_to_none=True)
        self.is_captured = True
        with tracer.capture(self.row_ids):
            self._loss(self.log_probs()).backward()

    def shared(self, tracer: InfluenceTracer) -> None:
        self.model.zero_grad(set_to_none=True)
        self.is_captured = True
        with tracer.capture(self.row_ids) as micro_batch:
            log_probs = self.log_probs()
            micro_batch.backward(self._objective(log_probs), retain_graph=True)
        self._loss(log_probs).backward()

    def separate(self, tracer: InfluenceTracer) -> None:
        self.is_captured = True
        with tracer.capture(self.row_ids) as micro_batch:
            micro_batch.backward(self._objective(self.log_probs()))
        self.plain()

    def forget(self, tracer: InfluenceTracer) -> None:
        """Score and forget what was captured, if anything was."""
        if self.is_captured:
            num_rows = len(self.tokens)
            tracer.pop_rows([0] * num_rows, [1.0] * num_rows)
            self.is_captured = False


def held_bytes(training: TrainingPass, tracer: InfluenceTracer) -> int:
    """GPU memory that a captured micro-batch occupies until ``pop_rows``."""
    training.fused(tracer)
    training.forget(tracer)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    training.fused(tracer)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    training.forget(tracer)
    return held


def kernel_seconds(run: Any) -> dict[str, float]:
    """GPU seconds by kernel of one run."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / 1e6 for event in profiler.key_averages()}


def hooks_kernels(training: TrainingPass, tracer: InfluenceTracer) -> dict[str, float]:
    """GPU seconds of the kernels that run in a fused pass and not, or longer than, in a plain one.

    Kernels that the model's own work uses, too, count by their difference.
    """
    plain = kernel_seconds(training.plain)
    fused = kernel_seconds(lambda: training.fused(tracer))
    training.forget(tracer)
    own = {name: seconds for name, seconds in fused.items() if name not in plain}
    common = sum(seconds for name, seconds in fused.items() if name in plain)
    own["kernels of the model, difference"] = common - sum(plain.values())
    return own


def values_read(model: nn.Module) -> int:
    """Numbers a token that the hooks must read once: every distinct input and every output gradient."""
    total = 0
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            shares_input = name.endswith(("k_proj", "v_proj", "up_proj"))
            total += linear.out_features + (0 if shares_input else linear.in_features)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try it on a CPU")
    arguments = parser.parse_args()
    require_gpu(parser, tiny=arguments.tiny)

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    shapes, length, factor = (TINY, 128, 16) if arguments.tiny else (REFERENCE, 8192, 256)
    model = build_model(shapes, device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = random_tokens(shapes, 2, length, device)
    config = TracerConfig(projection_dim_factor=factor)
    untimed_config = TracerConfig(projection_dim_factor=factor, profile_timing=False)
    untouched = TrainingPass(model, tokens)
    traced, untimed = (TrainingPass(copy.deepcopy(model), tokens) for _ in range(2))
    tracer = InfluenceTracer(traced.model, config)
    untimed_tracer = InfluenceTracer(untimed.model, untimed_config)

    def tidy() -> None:
        traced.forget(tracer)
        untimed.forget(untimed_tracer)
        tracer.pop_timing()

    rounds = {
        "no tracing": untouched.plain,
        "hooks idle": traced.plain,
        "fused": lambda: traced.fused(tracer),
        "fused, profile_timing off": lambda: untimed.fused(untimed_tracer),
    }
    times = interleaved(rounds, device, repeats=arguments.repeats, warm_ups=2, tidy=tidy)
    slow_rounds = {
        "no tracing": untouched.plain,
        "shared": lambda: traced.shared(tracer),
        "separate": lambda: traced.separate(tracer),
    }
    slow = interleaved(slow_rounds, device, repeats=max(2, arguments.repeats // 3), warm_ups=1, tidy=tidy)
    overheads = {name: ratio(taken, times["no tracing"]) for name, taken in times.items()}
    overheads |= {name: ratio(slow[name], slow["no tracing"]) for name in ("shared", "separate")}
    timing_effect = ratio(times["fused"], times["fused, profile_timing off"])

    num_tokens = tokens.numel()
    estimate = estimate_memory(traced.model, config, num_tokens, rows=len(tokens))
    estimated_held = (estimate.factors_bytes + estimate.gradients_bytes) / num_tokens
    results: dict[str, Any] = {
        "machine": machine(device),
        "tokens": num_tokens,
        "times": {name: taken.to_json() for name, taken in ({**slow, **times}).items()},
        "over_no_tracing": {name: taken.to_json() for name, taken in overheads.items()},
        "profile_timing_on_over_off": timing_effect.to_json(),
        "bytes_per_token": estimate.bytes_per_token,
        "estimated_held_bytes_per_token": estimated_held,
    }
    everything = {**times, "shared": slow["shared"], "separate": slow["separate"]}
    rows = [
        [name, f"{taken.median * 1e3:,.1f}", _percent(overheads[name])] for name, taken in everything.items()
    ]
    tables = [table([f"{tokens.shape[0]} x {length} tokens", "ms", "more than no tracing"], rows)]
    facts = [
        ["profile_timing on, more than off", _percent(timing_effect)],
        ["bytes that one more token takes", f"{estimate.bytes_per_token:,}"],
        ["estimated bytes a token, gradients of the rows included", f"{estimated_held:,.0f}"],
    ]
    if device.type == "cuda":
        held = held_bytes(traced, tracer)
        kernels = hooks_kernels(traced, tracer)
        read_bytes = values_read(model) * num_tokens * 2
        results |= {"held_bytes_per_token": held / num_tokens, "kernels_s": kernels, "read_bytes": read_bytes}
        facts += [
            ["measured bytes a token, gradients of the rows included", f"{held / num_tokens:,.0f}"],
            ["GB of inputs and output gradients that are read", f"{read_bytes / 1e9:.1f}"],
            ["ms of all kernels of the hooks", f"{sum(kernels.values()) * 1e3:.2f}"],
        ]
        longest = sorted(kernels.items(), key=lambda item: -item[1])[:8]
        facts += [[f"ms of {name[:70]}", f"{seconds * 1e3:.2f}"] for name, seconds in longest]
    tables.append(table(["beside it", "value"], facts))
    publish(results, tables, arguments.json)


def _percent(times: Times) -> str:
    return f"{(times.median - 1) * 100:+.2f} ± {times.spread * 100:.2f} %"


if __name__ == "__main__":
    main()
