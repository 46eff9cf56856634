"""The rollout ``hf_cpu``, registered beside verl's own on import: one server for all ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import ray
import torch
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.rollout import base
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from influence.hf_cpu.server import GenerationServer

ROLLOUT_NAME = "hf_cpu"


def _server_name(replica_rank: int) -> str:
    return f"influence_hf_cpu_server_{replica_rank}"


class HfCpuReplica(RolloutReplica):
    """Starts the server. All ranks belong to this one replica, by ``tensor_model_parallel_size``."""

    async def launch_servers(self) -> None:
        model = self.model_config
        if not hasattr(model, "tokenizer"):
            model = omega_conf_to_dataclass(model)
        name = _server_name(self.replica_rank)
        num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        server = GenerationServer.options(name=name).remote(  # type: ignore[attr-defined]
            model.local_path, model.tokenizer.eos_token_id, self.config.response_length, num_threads
        )
        self.servers = [server]
        self._server_handle = server
        self._server_address = name


class HfCpuRollout(BaseRollout):
    """A training worker's side: hands the new weights to the server, from whichever device they are on."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, model_config, device_mesh)
        self._replica_rank, rank_in_replica = divmod(
            int(os.environ["RANK"]), self.config.tensor_model_parallel_size
        )
        self._is_leader = rank_in_replica == 0

    async def resume(self, tags: list[str]) -> None:
        pass

    async def release(self) -> None:
        pass

    async def update_weights(
        self, weights: Iterator[tuple[str, torch.Tensor]], global_steps: int | None = None, **_unused: Any
    ) -> None:
        """Send the whole model. Every rank reads every weight, which is a collective; the leader sends."""
        state = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in weights}
        if self._is_leader:
            server = ray.get_actor(_server_name(self._replica_rank))
            await server.load_weights.remote(state, global_steps)


base._ROLLOUT_REGISTRY[(ROLLOUT_NAME, "async")] = f"{__name__}.{HfCpuRollout.__name__}"
RolloutReplicaRegistry.register(ROLLOUT_NAME, lambda: HfCpuReplica)
