"""verl's training worker on the CPU."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist
from verl.workers.engine_workers import ActorRolloutRefWorker


class CpuActorRolloutRefWorker(ActorRolloutRefWorker):
    """Makes the process group: verl's own backend string would name the CPU twice, which torch refuses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not dist.is_initialized():
            dist.init_process_group(
                "cpu:gloo",
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                init_method=os.environ.get("DIST_INIT_METHOD"),
            )
