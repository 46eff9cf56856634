"""verl on a machine without an accelerator: the CPU platform and rollout that it lacks.

verl imports `influence.cpu.platform` in every process (``VERL_USE_EXTERNAL_MODULES``) while it is only half
imported itself, so that nothing but the platform is registered there. The rollout follows when a worker's
configuration asks for its library (`influence.verl_engine.external`). Nothing is imported here, because the
rollout's server does without verl.
"""
