"""Every path inside a run directory, in both directions: number to path, and file name to number."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from influence.rundir.errors import CorruptError
from influence.rundir.files import list_dir
from influence.rundir.names import validate_run_name

STEP_DIGITS = "([0-9]{6}|[1-9][0-9]{6,})"
"""A step's number as file names write it, a pattern of one group."""
ATTEMPT_DIGITS = "([0-9]{4}|[1-9][0-9]{4,})"
"""An attempt's number, likewise."""

STEP_RECORD = re.compile(rf"step_{STEP_DIGITS}\.json")
ATTEMPT_RECORD = re.compile(rf"{ATTEMPT_DIGITS}\.json")
_REPLAYS_OF = re.compile(rf"attempt-{ATTEMPT_DIGITS}")


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The layout of one run directory (the tree is in ARCHITECTURE.md)."""

    root_dir: Path
    """The run directory: ``<root>/<run>``."""

    @classmethod
    def of(cls, root: Path | str, run_name: str) -> RunPaths:
        """The run ``run_name`` below ``root``, which may exist or not.

        Raises:
            RunNameError: the name is no run name (so it cannot leave ``root`` either).
            CorruptError: a symbolic link stands in the run's place.
        """
        validate_run_name(run_name)
        paths = cls(Path(os.path.abspath(root)) / run_name)  # noqa: PTH100 - resolve() would follow links
        if paths.root_dir.is_symlink():
            raise CorruptError(
                paths.root_dir,
                "a symbolic link stands where a run directory should",
                "choose the root that it points into, or another name",
            )
        return paths

    @classmethod
    def at(cls, run_dir: Path | str) -> RunPaths:
        """The run directory at this path, as a trainer is given it; checks like `of`."""
        run_dir = Path(os.path.abspath(run_dir))  # noqa: PTH100 - resolve() would follow links
        return cls.of(run_dir.parent, run_dir.name)

    @property
    def name(self) -> str:
        return self.root_dir.name

    @property
    def run_json(self) -> Path:
        return self.root_dir / "run.json"

    @property
    def attempts_dir(self) -> Path:
        return self.root_dir / "attempts"

    def attempt(self, number: int) -> Path:
        return self.attempts_dir / f"{number:04d}.json"

    @property
    def logs_dir(self) -> Path:
        return self.root_dir / "logs"

    def log(self, number: int) -> Path:
        return self.logs_dir / f"{attempt_label(number)}.log"

    @property
    def metrics_dir(self) -> Path:
        return self.root_dir / "metrics"

    def metrics(self, number: int) -> Path:
        return self.metrics_dir / f"{attempt_label(number)}.jsonl"

    @property
    def steps_dir(self) -> Path:
        return self.root_dir / "steps"

    def step_npz(self, step: int) -> Path:
        return self.steps_dir / f"step_{step:06d}.npz"

    def step_record(self, step: int) -> Path:
        return self.steps_dir / f"step_{step:06d}.json"

    @property
    def replays_dir(self) -> Path:
        return self.root_dir / "replays"

    def replays_of(self, number: int) -> Path:
        return self.replays_dir / attempt_label(number)

    def replay_npz(self, number: int, step: int) -> Path:
        return self.replays_of(number) / self.step_npz(step).name

    def replay_record(self, number: int, step: int) -> Path:
        return self.replays_of(number) / self.step_record(step).name

    @property
    def checkpoints_dir(self) -> Path:
        return self.root_dir / "checkpoints"

    @property
    def inputs_dir(self) -> Path:
        """What the trainer makes of model and data where every node must see the same files."""
        return self.root_dir / "inputs"

    @property
    def wandb_dir(self) -> Path:
        return self.root_dir / "wandb"

    @property
    def local_dir(self) -> Path:
        return self.root_dir / "local"

    @property
    def supervisor_json(self) -> Path:
        return self.local_dir / "supervisor.json"

    @property
    def events_jsonl(self) -> Path:
        return self.local_dir / "events.jsonl"

    @property
    def supervisor_log(self) -> Path:
        return self.local_dir / "supervisor.log"

    @property
    def cancel_file(self) -> Path:
        return self.local_dir / "cancel"

    @property
    def suspend_file(self) -> Path:
        return self.local_dir / "suspend"

    def attempt_numbers(self) -> list[int]:
        """The attempts there are, in increasing order."""
        return [number for number, _ in _numbered(self.attempts_dir, ATTEMPT_RECORD)]

    def committed_step_numbers(self) -> list[int]:
        """The steps that have a record under ``steps/``, in increasing order."""
        return [step for step, _ in _numbered(self.steps_dir, STEP_RECORD)]

    def replayed_step_numbers(self) -> dict[int, list[int]]:
        """For each attempt with a directory under ``replays/``: the steps that have a record there."""
        return {
            number: [step for step, _ in _numbered(directory, STEP_RECORD)]
            for number, directory in _numbered(self.replays_dir, _REPLAYS_OF)
        }


def attempt_label(number: int) -> str:
    """``attempt-0001``: how logs, metrics, replays and temporary files name an attempt."""
    return f"attempt-{number:04d}"


def _numbered(directory: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    """The entries of a directory whose whole name is the pattern, sorted by the number in it (from 1)."""
    matches = ((pattern.fullmatch(path.name), path) for path in list_dir(directory))
    found = [(int(match[1]), path) for match, path in matches if match]
    return sorted((number, path) for number, path in found if number > 0)
