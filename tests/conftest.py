"""Settings of every test process."""

import os
import signal

# A shell without job control starts background commands with Ctrl-C ignored, which children would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests run side by side (`pytest -n auto`): threads inside one would only push the others aside.
# This must come before anything imports numpy or torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A user's own folders must not lend a test presets, an index or a root for runs.
for _variable in (
    *("INFL_JOBS", "INFL_ROOT", "INFL_RESULTS", "INFL_INDEX", "INFL_CLUSTER", "INFL_CONFIG"),
    *("WANDB_ENTITY", "WANDB_BASE_URL"),
):
    os.environ.pop(_variable, None)
os.environ["XDG_CONFIG_HOME"] = "/nonexistent"  # nor a profile of a cluster

from hypothesis import settings  # noqa: E402

# A slow machine is no failure. What is drawn is the same every time, so that a change is judged by what it
# does; INFL_HYPOTHESIS=random draws anew, to look for what nobody has thought of.
settings.register_profile("random", deadline=None, print_blob=True)
settings.register_profile("steady", settings.get_profile("random"), derandomize=True)
settings.load_profile(os.environ.get("INFL_HYPOTHESIS", "steady"))
