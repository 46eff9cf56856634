"""The rollout ``hf_cpu``: responses generated with transformers on the CPU, whatever device trains.

For small models: on machines without an accelerator, and on those that have one but no vLLM. verl's workers
register it when their configuration asks for our library (`influence.verl_engine.external`). Nothing is
imported here, because the rollout's server does without verl.
"""
