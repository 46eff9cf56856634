"""One user's folders, with the launcher run in them: in this process, or in one of its own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from launcher.group import run as run_launcher
from tests.launcher.synthetic_run import RUN


@dataclass(frozen=True)
class Home:
    path: Path

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    @property
    def results(self) -> Path:
        return self.path / "results"

    @property
    def copy(self) -> Path:
        return self.results / RUN

    @property
    def index(self) -> Path:
        return self.path / "index.sqlite"

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("INFL_", "XDG_"))}
        return kept | {
            "INFL_ROOT": str(self.runs),
            "INFL_RESULTS": str(self.results),
            "INFL_INDEX": str(self.index),
        }

    def launcher(self, *args: str) -> subprocess.CompletedProcess[str]:
        """The command as ``launcher.cli`` runs it, without the price of a new interpreter."""
        out, err = io.StringIO(), io.StringIO()
        with patch.dict(os.environ, self.environment, clear=True), redirect_stdout(out), redirect_stderr(err):
            code = run_launcher(list(args))
        return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())

    def document(self, *args: str) -> Any:
        return json.loads(self.launcher(*args, "--output", "json").stdout)

    def process(self, *args: str) -> subprocess.CompletedProcess[str]:
        """A real process of this Python."""
        return subprocess.run(
            [sys.executable, *args],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
