"""What verl imports by ``external_lib``: registers the engine, and the rollout beside verl's own."""

from influence.hf_cpu import replica
from influence.verl_engine import engine

__all__ = ["engine", "replica"]
