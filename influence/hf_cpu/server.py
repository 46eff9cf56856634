"""The rollout's server: a Ray actor that takes token ids and gives token ids, with transformers on the CPU.

Nothing of verl is imported here: the actor has a process of its own, and importing verl costs it seconds.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from influence.hf_cpu.sampling import SamplingSettings, draw_token, token_log_probs


@dataclass(slots=True)
class GeneratedTokens:
    """A response; the fields are those of verl's ``TokenOutput``, which its client reads by name."""

    token_ids: list[int]
    log_probs: list[float]
    stop_reason: str
    """``completed`` after the end token, ``length`` at the limit."""
    extra_fields: dict[str, Any] = field(default_factory=dict)
    routed_experts: None = None
    num_preempted: int = 0


class TokenGenerator:
    """A causal language model that continues prompts, one at a time.

    One at a time on purpose: the rounding of a batched product depends on the batch, so that a retried step
    could not draw the same tokens.
    """

    def __init__(self, model: Any, end_token_id: int, max_new_tokens: int) -> None:
        self._model = model
        self._end_token_id = end_token_id
        self._max_new_tokens = max_new_tokens

    @torch.inference_mode()
    def generate(self, prompt_ids: list[int], settings: SamplingSettings, seed: int) -> GeneratedTokens:
        """Continue ``prompt_ids`` up to the end token, which is part of the response."""
        generator = torch.Generator().manual_seed(seed)
        output = GeneratedTokens([], [], "length")
        input_ids_1L, past = torch.tensor([prompt_ids]), None
        while len(output.token_ids) < self._max_new_tokens:
            step = self._model(input_ids=input_ids_1L, past_key_values=past, use_cache=True, logits_to_keep=1)
            past = step.past_key_values
            log_probs_V = token_log_probs(step.logits[0, -1], settings)
            token_id = draw_token(log_probs_V, generator)
            output.token_ids.append(token_id)
            output.log_probs.append(float(log_probs_V[token_id]))
            if token_id == self._end_token_id:
                output.stop_reason = "completed"
                break
            input_ids_1L = torch.tensor([[token_id]])
        return output


@ray.remote(num_cpus=0)
class GenerationServer:
    """Serves verl's rollout client; the weights come from the training workers."""

    def __init__(self, model_path: str, end_token_id: int, max_new_tokens: int, num_threads: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(num_threads)
        config = AutoConfig.from_pretrained(model_path)
        self._model = AutoModelForCausalLM.from_config(config).float().eval()
        self._generator = TokenGenerator(self._model, end_token_id, max_new_tokens)
        self._step = 0
        self._one_at_a_time = asyncio.Lock()

    async def load_weights(self, weights: dict[str, torch.Tensor], step: int | None) -> None:
        """Take over the policy's weights after ``step`` updates.

        Raises:
            ValueError: names that the model does not have.
        """
        _, unexpected = self._model.load_state_dict(weights, strict=False)  # tied weights come once
        if unexpected:
            raise ValueError(f"the rollout's model has no parameters named {', '.join(unexpected[:5])}")
        self._model.tie_weights()
        if step is not None:
            self._step = step

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_unused: Any
    ) -> GeneratedTokens:
        """verl's request; ``sampling_params`` holds a ``seed`` from `influence.hf_cpu.agent_loop`."""
        settings = SamplingSettings(
            temperature=sampling_params["temperature"],
            top_p=sampling_params["top_p"],
            top_k=sampling_params["top_k"],
        )
        async with self._one_at_a_time:
            output = await asyncio.to_thread(
                self._generator.generate, list(prompt_ids), settings, sampling_params["seed"]
            )
        output.extra_fields["global_steps"] = self._step
        return output

    # No memory is handed back and forth between training and this rollout, so these do nothing.
    async def wake_up(self, **_unused: Any) -> None: ...
    async def sleep(self, **_unused: Any) -> None: ...
    async def abort_all_requests(self, **_unused: Any) -> None: ...
    async def resume_generation(self) -> None: ...
    async def clear_kv_cache(self) -> None: ...
    async def release_kv_cache(self) -> None: ...
    async def resume_kv_cache(self) -> None: ...
    async def start_profile(self, **_unused: Any) -> None: ...
    async def stop_profile(self) -> None: ...
