"""``python -m influence.train --run-dir DIR``: one attempt at a run.

Two processes. The parent needs the standard library only: it claims the attempt, keeps its log, passes
signals on and records how it ended. The child imports torch, builds verl's configuration and runs verl.
"""
