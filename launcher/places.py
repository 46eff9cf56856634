"""The folders of runs and of results, and commands that find them again.

A command that the launcher suggests must work as it is printed. So it names a folder that was given by flag;
the default, and what the environment says, need no word. A cluster is named by ``Profile.options``.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

DEFAULT_ROOT = Path("runs")
ROOT_VARIABLE = "INFL_ROOT"
DEFAULT_RESULTS = Path("results")
RESULTS_VARIABLE = "INFL_RESULTS"


def local_root(given: Path | None) -> Path:
    """The folder of this machine's run directories: as given, else the environment's, else the default."""
    return Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT) if given is None else given


def suggest(*words: str, root: Path | None = None, results: Path | None = None) -> str:
    """A command line of the launcher, quoted for a shell.

    Args:
        words: the command with its arguments and options (``*site.options``), without the folders below.
        root: the folder of this machine's run directories that it is about; None where it takes none.
        results: the folder of collected copies that it is about; None likewise.
    """
    return shlex.join(["launcher", *words, *root_words(root), *results_words(results)])


def is_command(text: str) -> bool:
    """Whether a text is a command line of the launcher and nothing else, rather than words that name one."""
    if not text.startswith("launcher"):  # most advice is words, and a list of runs asks this of each
        return False
    try:
        words = shlex.split(text)
    except ValueError:  # an apostrophe
        return False
    return words[:1] == ["launcher"] and shlex.join(words) == text


def root_words(root: Path | None) -> tuple[str, ...]:
    """The option that names a folder of this machine's run directories, where it needs naming."""
    return _folder_words("--root", root, ROOT_VARIABLE, DEFAULT_ROOT)


def results_words(results: Path | None) -> tuple[str, ...]:
    """The option that names a folder of collected copies, where it needs naming."""
    return _folder_words("--results", results, RESULTS_VARIABLE, DEFAULT_RESULTS)


def _folder_words(option: str, folder: Path | None, variable: str, default: Path) -> tuple[str, ...]:
    if folder is None or _absolute(folder) == _absolute(Path(os.environ.get(variable) or default)):
        return ()
    return option, str(folder)


def _absolute(path: Path) -> str:
    try:
        return os.path.abspath(path)  # noqa: PTH100 - not resolve(): a link is another word for a folder
    except FileNotFoundError:  # the current directory was removed
        return str(path)
