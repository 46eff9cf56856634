"""verl's training on a machine without an accelerator: the CPU platform that it lacks.

verl imports `influence.cpu.platform` in every process (``VERL_USE_EXTERNAL_MODULES``) while it is only half
imported itself, so that nothing but the platform is registered there.
"""
