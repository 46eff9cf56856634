"""verl's synchronous trainer with names, order and bookkeeping that a retry can rely on.

Registered with verl as trainer mode ``influence``. What is computed is verl's own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from omegaconf import DictConfig, open_dict
from verl.trainer.ppo.v1 import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu

from influence.rundir import Attempt, RunPaths
from influence.verl_engine import environment
from influence.verl_engine.checkpoints import begin_checkpoint, checkpoint_attempt
from influence.verl_engine.engine import STEP_KEY
from influence.verl_engine.overrides import TRAINER_MODE

_OUR_METRICS = ("influence_trace/", "timing_s/")


@register_trainer(TRAINER_MODE)
class InfluencePPOTrainer(PPOTrainerSync):
    """One training step is one committed step of the run."""

    def __init__(self, config: DictConfig) -> None:
        with open_dict(config):
            config.trainer.v1.trainer_mode = "sync"  # verl branches on this word, not on the class
        super().__init__(config)
        self._attempt = Attempt(
            RunPaths(Path(os.environ[environment.RUN_DIR])), int(os.environ[environment.ATTEMPT])
        )
        self._num_prompts_named = (0, 0)

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        if self.config.trainer.device == "cpu":
            from influence.cpu.worker import CpuActorRolloutRefWorker

            worker = ray.remote(CpuActorRolloutRefWorker)
            for role in self.role_worker_mapping:
                self.role_worker_mapping[role] = worker

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps > 0:
            checkpoints_dir = Path(self.config.trainer.default_local_dir)
            self._attempt.set_resume(
                self.global_steps, checkpoint_attempt(checkpoints_dir, self.global_steps)
            )

    def _save_checkpoint(self) -> None:
        begin_checkpoint(Path(self.config.trainer.default_local_dir), self.global_steps, self._attempt.number)
        super()._save_checkpoint()

    def _fetch_one_gen_batch(self) -> Any:
        """The next prompts, named by step and place where verl draws random names, which no retry repeats."""
        batch = super()._fetch_one_gen_batch()
        step, first = self._num_prompts_named
        if step != self.global_steps:
            first = 0
        names = [f"{self.global_steps:06d}-{first + place:06d}" for place in range(len(batch))]
        self._num_prompts_named = (self.global_steps, first + len(batch))
        tu.assign_non_tensor_stack(batch, "uid", names)
        return batch

    def _balance_batch(self, batch: Any, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Responses in the order of their prompts, where verl has them in the order of their completion."""
        batch.reorder(sorted(range(len(batch.keys)), key=lambda row: _row_order(batch.keys[row])))
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch.extra_info[STEP_KEY] = self.global_steps
        batch = super()._update_actor(batch, metrics)
        # verl puts "actor/" before whatever a worker reports.
        for name in [name for name in metrics if name.removeprefix("actor/").startswith(_OUR_METRICS)]:
            metrics[name.removeprefix("actor/")] = metrics.pop(name)
        return batch


def _row_order(key: str) -> tuple[str, int, int]:
    """A row's key is ``{uid}_{session}_{output}``."""
    uid, session, output = key.rsplit("_", 2)
    return uid, int(session), int(output)
