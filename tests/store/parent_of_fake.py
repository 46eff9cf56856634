"""``influence.train``'s parent as it is, with `fake_child` in place of verl, on whatever machine this is."""

from __future__ import annotations

import sys
from pathlib import Path

from influence.train import parent, preflight

preflight.preflight = lambda spec, machine: None
parent._child_command = lambda paths: [
    sys.executable,
    str(Path(__file__).with_name("fake_child.py")),
    "--run-dir",
    str(paths.root_dir),
]

if __name__ == "__main__":
    sys.exit(parent.main())
