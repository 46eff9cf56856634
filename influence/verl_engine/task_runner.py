"""The Ray actor that verl's driver starts: verl's own, with our trainer known to it."""

from __future__ import annotations

from typing import Any

import ray
from verl.trainer.main_ppo import TaskRunnerV1


@ray.remote
class InfluenceTaskRunner:
    """Registers the trainer in the actor's process, then is `TaskRunnerV1`."""

    def run(self, config: Any) -> None:
        from influence.verl_engine import trainer  # noqa: F401  (registers itself)

        # verl decorates its class, so a subclass or an instance needs the one underneath.
        TaskRunnerV1.__ray_metadata__.modified_class().run(config)
