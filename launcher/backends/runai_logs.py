"""Where the logs of a training are read, since Run:ai's REST API has none."""

from __future__ import annotations

from collections.abc import Sequence

from influence.rundir import RunPaths, StorageError
from influence.rundir.files import open_inside
from launcher.errors import BackendError
from launcher.profiles import Profile

_CHUNK_BYTES = 2**18


class DirectoryLogs:
    """The attempts' logs in a run directory that this machine sees."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths

    def attempts(self) -> Sequence[int]:
        """As ``Backend.attempts``."""
        return [number for number in self._paths.attempt_numbers() if self._paths.log(number).is_file()]

    def read(self, attempt: int, offset_bytes: int) -> bytes:
        """As ``Backend.read_log``; StorageError where the directory cannot be read."""
        path = self._paths.log(attempt)
        try:
            with open_inside(self._paths.root_dir, path) as stream:
                stream.seek(offset_bytes)
                return stream.read(_CHUNK_BYTES)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise StorageError.from_os_error(error, path, "reading") from None


def open_logs(profile: Profile, run: str) -> DirectoryLogs:
    """The logs of a run.

    Raises:
        BackendError: the profile names no place that has them.
    """
    if profile.root is not None:
        return DirectoryLogs(RunPaths.of(profile.root, run))
    raise BackendError(
        f"no log of run '{run}' can be read from here",
        why="Run:ai's REST API has no logs, and this machine does not see the run directories",
        next_step=f"mount the claim here and set root in cluster '{profile.name}' (or give --root), or read "
        f"the log in Run:ai's pages or with its own command line: runai training logs {run}",
    )
