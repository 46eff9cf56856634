"""verl's settings that a run itself decides, so that a preset's ``verl:`` may not hold them.

The run directory and its retries depend on them. Standard library only: the launcher refuses them before a
run starts, the trainer again before it starts verl.
"""

from __future__ import annotations

OWNED_BY_THE_RUN = (
    "actor_rollout_ref.model.external_lib",
    "trainer.v1.trainer_mode",
    "trainer.default_local_dir",
    "trainer.resume_mode",
    "trainer.resume_from_path",
    "trainer.total_training_steps",
    "trainer.experiment_name",
    "trainer.use_v1",
)


def is_owned_by_the_run(key: str) -> bool:
    """Whether a dotted key of verl, with or without ``+``, is one of them, or Hydra's own."""
    name = key.removeprefix("+")
    return name in OWNED_BY_THE_RUN or name.partition(".")[0] == "hydra"
