"""``launcher submit`` for a run of the fake trainer.

    python submit_fake.py ROOT RUN SPEC [--follow]

Everything behind the command line's parsing is the real thing: the plan, the backend with another trainer
command, the report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from launcher.commands.submit import submit
from launcher.lifecycle import plan_submit
from tests.launcher.local_run import LocalRun


def main() -> int:
    run = LocalRun(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
    plan = plan_submit(run.site, run.run)
    return submit(
        run.site,
        plan,
        follow_run="--follow" in sys.argv,
        output_format="json" if "--json" in sys.argv else "text",
    )


if __name__ == "__main__":
    sys.exit(main())
