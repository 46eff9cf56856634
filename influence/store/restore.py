"""From the store to an empty disk: what a start needs to know of a run, small files only.

A step's NPZ is not needed: whether it is committed, and what it holds, its record says.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from influence.rundir import RunPaths, StorageError, write_atomic
from influence.rundir.files import make_dir
from influence.store.commits import finish_announced
from influence.store.run_store import RunStore, orphans, step_of

_NUM_AT_ONCE = 16
_UNSENT = "unsent"


class Restore:
    """Brings a run to this machine; a second time, only what has changed since.

    The store is the run: a commit that lies on this machine only was never the run's. It is moved below
    ``unsent/``, and the step is computed again.
    """

    def __init__(self, run: RunStore) -> None:
        self._run = run
        self._seen: dict[Path, tuple[int, str | None]] = {}

    def fetch(self) -> None:
        """``run.json``, attempts, commit records and metrics.

        Raises:
            StoreError: the store cannot be read. StorageError: this machine's disk refused.
        """
        run, paths = self._run, self._run.paths
        with suppress(FileNotFoundError):  # no attempt has come as far as that
            if not paths.run_json.exists():  # where one is there, it is compared, not replaced
                self._fetch(paths.run_json)
        found = {}
        for directory in (paths.attempts_dir, paths.steps_dir, paths.replays_dir, paths.metrics_dir):
            found.update(run.entries(directory))
        wanted = [path for path in found if self._is_wanted(path)]
        self._set_aside(set(wanted))
        changed = [path for path in wanted if self._seen.get(path) != (found[path].bytes, found[path].etag)]
        with ThreadPoolExecutor(_NUM_AT_ONCE) as pool:
            list(pool.map(self._fetch, changed))
        self._seen.update({path: (found[path].bytes, found[path].etag) for path in changed})

    def finish_announced(self) -> None:
        """Complete the commits that attempts before this one had nearly made; raises as `fetch`."""
        run = self._run
        found = run.entries(run.paths.steps_dir)
        steps = orphans(run.paths, found)
        for step in steps:
            finish_announced(run, step)
        if steps:
            self.fetch()
        # What an attempt announced and did not begin may still come, from one that hangs.
        records = [*found, *(run.paths.step_record(step) for step in steps)]
        committed = {f".{path.name}" for path in records if step_of(path)}
        run.objects.delete(run.key(path) for path in found if path.name.rpartition(".")[0] in committed)

    def _is_wanted(self, path: Path) -> bool:
        paths = self._run.paths
        if path.parent in (paths.attempts_dir, paths.metrics_dir):
            return not path.name.startswith(".")
        return step_of(path) is not None

    def _fetch(self, path: Path) -> None:
        data = self._run.objects.read(self._run.key(path))
        if path.is_file():
            if path.read_bytes() == data:
                return
            if step_of(path) is not None:
                _move_aside(self._run.paths, path)
        make_dir(path.parent)
        write_atomic(path, data)

    def _set_aside(self, in_store: set[Path]) -> None:
        """Commits that an attempt on this very disk could not send before it was killed."""
        paths = self._run.paths
        here = [paths.step_record(step) for step in paths.committed_step_numbers()]
        for number, steps in paths.replayed_step_numbers().items():
            here += [paths.replay_record(number, step) for step in steps]
        for path in here:
            if path not in in_store:
                _move_aside(paths, path)


def _move_aside(paths: RunPaths, record_path: Path) -> None:
    """A commit record and its NPZ, to the same names below ``unsent/``; the record first."""
    for path in (record_path, record_path.with_suffix(".npz")):
        target = paths.root_dir / _UNSENT / path.relative_to(paths.root_dir)
        make_dir(target.parent)
        try:
            path.replace(target)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StorageError.from_os_error(error, path, "moving") from None
