"""verl's single-turn agent loop with a seed for every response."""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from influence.hf_cpu.sampling import response_seed


class SeededSingleTurnAgentLoop(SingleTurnAgentLoop):
    """Which tokens are drawn then depends on seed, step, prompt and session, not on who asks first."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        seed = response_seed(
            self.rollout_config.seed,
            int(kwargs["global_steps"]),
            int(kwargs["index"]),
            int(kwargs["session_id"]),
        )
        # A copy: the sessions of a prompt share the dictionary that they are given.
        return await super().run({**sampling_params, "seed": seed}, **kwargs)
