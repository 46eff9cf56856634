"""The folders of runs and of results, and commands that find them again.

A command that the launcher suggests must work as it is printed. So it names a folder that was given by flag;
the default, and what the environment says, need no word.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

DEFAULT_ROOT = Path("runs")
ROOT_VARIABLE = "INFL_ROOT"
DEFAULT_RESULTS = Path("results")
RESULTS_VARIABLE = "INFL_RESULTS"


def suggest(*words: str, root: Path | None = None, results: Path | None = None) -> str:
    """A command line of the launcher, quoted for a shell.

    Args:
        words: the command with its arguments, without the folders.
        root: the folder of run directories that it is about; None for a command that takes none.
        results: the folder of collected copies that it is about; None likewise.
    """
    folders = (
        *folder_words("--root", root, ROOT_VARIABLE, DEFAULT_ROOT),
        *folder_words("--results", results, RESULTS_VARIABLE, DEFAULT_RESULTS),
    )
    return shlex.join(["launcher", *words, *folders])


def folder_words(option: str, folder: Path | None, variable: str, default: Path) -> tuple[str, ...]:
    """The option that names a folder; nothing where a command would use that folder anyway."""
    if folder is None or _absolute(folder) == _absolute(Path(os.environ.get(variable) or default)):
        return ()
    return option, str(folder)


def _absolute(path: Path) -> str:
    try:
        return os.path.abspath(path)  # noqa: PTH100 - not resolve(): a link is another word for a folder
    except FileNotFoundError:  # the current directory was removed
        return str(path)
