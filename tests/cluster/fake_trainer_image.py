"""An image whose ``python -m influence.train`` is ``tests/launcher/fake_trainer.py``, which obeys orders."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.bench.bench import Bench
from tests.cluster.bench.images import make_image

FAKE_TRAINER = Path(__file__).parents[1] / "launcher" / "fake_trainer.py"

#: Writes run.json as the trainer does, then becomes the fake trainer. Runs in the container.
_TRAIN = """#!{python}
import json, os, sys
from pathlib import Path
from influence.rundir import RunPaths, RunSpec, create_run
assert sys.argv[1:4] == ["-m", "influence.train", "--run-dir"], sys.argv
create_run(RunPaths.at(Path(sys.argv[4])), RunSpec.from_dict(json.loads(os.environ["INFL_RUN_JSON"])))
os.execv({python!r}, [{python!r}, {trainer!r}, {orders!r}, sys.argv[4]])
"""


def fake_trainer_image(bench: Bench, name: str, *starts: Sequence[str]) -> str:
    """Makes the image ``bench/NAME:1`` with orders for each start of the fake trainer; returns its name."""
    image = f"bench/{name}:1"
    # In a folder of their own, where the fake trainer counts its starts.
    orders = bench.folder / "orders" / name / "orders.json"
    orders.parent.mkdir(parents=True)
    orders.write_text(json.dumps(starts))
    script = _TRAIN.format(python=sys.executable, trainer=str(FAKE_TRAINER), orders=str(orders))
    make_image(bench.folder, image, {"python": script})
    return image
