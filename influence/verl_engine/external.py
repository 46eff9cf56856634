"""What verl imports by ``external_lib``: registers the engine, and on a CPU the rollout."""

from verl.utils.device import get_device_name

from influence.verl_engine import engine

if get_device_name() == "cpu":
    from influence.cpu import rollout

    __all__ = ["engine", "rollout"]
else:
    __all__ = ["engine"]
