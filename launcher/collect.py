"""Copies a run's results, verified: what is good arrives and stays, what is not is named.

The copy is a run directory itself (``influence.rundir.load_step`` reads it) with a ``manifest.json`` beside
``run.json``. Commit records are copied first, then the score files of the lineage that leads to the last
step, each compared with its record. A score file whose copy already has the record's size and SHA-256 is not
read again at the source; so a collect can be stopped and repeated, and be run while the run goes on.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from influence.rundir.attempts import AttemptRecord, read_attempt
from influence.rundir.clock import utc_now
from influence.rundir.errors import CorruptError, RunDirError, SchemaVersionError, StorageError
from influence.rundir.exits import describe
from influence.rundir.files import make_dir
from influence.rundir.lineage import committed_steps, compare
from influence.rundir.metrics import read_metrics
from influence.rundir.paths import RunPaths
from influence.rundir.record import CommitRecord, read_record
from influence.rundir.spec import RunSpec, read_run
from launcher.copying import Advance, Fingerprint, MismatchError, copy_file, fingerprint, remove_parts
from launcher.errors import ConflictError
from launcher.ledger import Ledger, Progress
from launcher.manifest import FileEntry, Manifest, Problem, ScoreFacts, write_manifest
from launcher.places import suggest
from launcher.strays import find_strays


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a collect did."""

    run_dir: Path
    """The collected copy."""
    manifest: Manifest
    copied: tuple[FileEntry, ...]
    """Files that were copied; every other file of the manifest was there already and was verified."""


def _ignore(_: object) -> None:
    """Nobody wants to know."""


def collect(
    source: RunPaths, results_dir: Path, progress: Progress | None = None, *, all_commits: bool = False
) -> Outcome:
    """Copy what a run has committed into ``<results_dir>/<run>`` and write the manifest.

    Args:
        all_commits: copy the score file of every commit, not only of the lineage that leads to the last step.

    Raises:
        NotARunError: ``source`` has no ``run.json``.
        SchemaVersionError: another version wrote the run.
        CorruptError: its ``run.json`` cannot be used, or a link stands where the copy belongs.
        ConflictError: the results folder holds another run of this name; nothing was changed.
        StorageError: the filesystem of the results refused; what was copied so far stays.
    """
    run_spec = read_run(source)
    target = RunPaths.of(results_dir, source.name)
    make_dir(target.root_dir)
    progress = progress or Progress()
    with _only_collect_of(target.root_dir, progress):
        _require_same_run(source, run_spec, target)
        return _Collect(source, target, run_spec, Ledger(target, progress)).run(all_commits)


@contextmanager
def _only_collect_of(run_dir: Path, progress: Progress) -> Iterator[None]:
    """One collect of a copy at a time; the lock goes with the process, however that ends."""
    fd = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.waiting()
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:  # a filesystem without locks
            raise StorageError.from_os_error(error, run_dir, "locking") from None
        yield
    finally:
        os.close(fd)


def _require_same_run(source: RunPaths, run_spec: RunSpec, target: RunPaths) -> None:
    """A copy of another run of this name is neither overwritten nor mixed with this one."""
    try:
        collected = read_run(target)
    except RunDirError:
        return  # nothing there yet, or damaged: the source's takes its place
    if collected == run_spec:
        return
    why = f"its spec hash is {collected.spec_hash[:19]}..., this run's is {run_spec.spec_hash[:19]}..."
    if collected.spec_hash == run_spec.spec_hash:
        times = [spec.provenance.get("created_at") for spec in (collected, run_spec)]
        why = f"it has the same settings and was submitted at {times[0]}, this run at {times[1]}"
    again = suggest("collect", "--run", source.name, "--results", "OTHER_FOLDER", root=source.root_dir.parent)
    raise ConflictError(
        f"{target.root_dir} holds another run of this name",
        why=why,
        next_step=f"move it away, or: {again}",
    )


class _RefusedError(Exception):
    """A score file with the right bytes that is none."""


class _Collect:
    """One collect at work. Files are named relative to the run, with ``/``, and so the same on both sides."""

    def __init__(self, source: RunPaths, target: RunPaths, run_spec: RunSpec, ledger: Ledger) -> None:
        self._source = source
        self._target = target
        self._run_spec = run_spec
        self._ledger = ledger
        self._num_total_steps = _total_steps(run_spec, source)

    def run(self, all_commits: bool) -> Outcome:
        self._remove_parts()
        self._take_unchanging(_name(self._source.run_json, self._source))
        attempts = self._take_attempts()
        for growing in (self._source.events_jsonl, self._source.supervisor_log):
            self._take_changing(_name(growing, self._source), only_grows=True)
        records = self._take_records()
        damaged: list[CorruptError] = []
        lineage = committed_steps(self._target, damaged=damaged)
        for error in damaged:
            self._ledger.find_error(error, _name(error.path, self._target))
        wanted = {record.npz(self._source): record for record in records} if all_commits else {}
        wanted |= {record.npz(self._source): record for record in lineage.values()}
        self._ledger.progress.start(len(wanted), sum(record.bytes for record in wanted.values()))
        for npz, record in wanted.items():
            self._take_scores(_name(npz, self._source), record)
        for file, reason in find_strays(self._source, self._num_total_steps):
            self._ledger.find(Problem.FOREIGN, file, reason)
        self._name_missing_steps(lineage, attempts)
        self._ledger.keep_former()
        manifest = self._ledger.manifest(
            run=self._source.name,
            spec_hash=self._run_spec.spec_hash,
            source=str(self._source.root_dir),
            num_total_steps=self._num_total_steps,
            collected_at=utc_now(),
        )
        manifest = write_manifest(self._target.root_dir, manifest)
        return Outcome(run_dir=self._target.root_dir, manifest=manifest, copied=tuple(self._ledger.copied))

    def _remove_parts(self) -> None:
        target = self._target
        replays = [target.replays_of(number) for number in target.replayed_step_numbers()]
        for folder in (
            target.root_dir,
            target.attempts_dir,
            target.logs_dir,
            target.metrics_dir,
            target.local_dir,
            target.steps_dir,
            *replays,
        ):
            remove_parts(folder)

    def _take_attempts(self) -> list[AttemptRecord]:
        """Attempt records, logs and metrics: they change as long as the attempt lasts."""
        attempts = []
        for number in self._source.attempt_numbers():
            path = self._source.attempt(number)
            try:
                attempts.append(read_attempt(self._source, number))
            except RunDirError as error:
                self._ledger.find_error(error, _name(path, self._source), attempt=number)
            else:
                self._take_changing(_name(path, self._source), number)
            for path in (self._source.log(number), self._source.metrics(number)):
                self._take_changing(_name(path, self._source), number, only_grows=True)
            try:
                read_metrics(self._target, number)
            except CorruptError as error:
                file = _name(self._source.metrics(number), self._source)
                self._ledger.find(Problem.CORRUPT, file, error.reason, attempt=number)
        return attempts

    def _take_records(self) -> list[CommitRecord]:
        """All sound commit records of this run, replays' included."""
        source = self._source
        places: list[tuple[int, int | None]] = [(step, None) for step in source.committed_step_numbers()]
        for attempt, steps in source.replayed_step_numbers().items():
            places += [(step, attempt) for step in steps]
        records = []
        for step, replay_of in places:
            path = source.step_record(step) if replay_of is None else source.replay_record(replay_of, step)
            file = _name(path, source)
            try:
                record = read_record(source, step, replay_of)
            except FileNotFoundError:
                continue
            except RunDirError as error:
                self._ledger.find_error(error, file, step, replay_of)
                continue
            foreign = None
            if record.spec_hash != self._run_spec.spec_hash:
                foreign = f"belongs to another run: its spec hash is {record.spec_hash[:19]}..."
            elif step > self._num_total_steps:
                foreign = f"the run has {self._num_total_steps} steps"
            if foreign is not None:
                kept = self._ledger.keep(file)
                self._ledger.find(Problem.FOREIGN, file, foreign, step, record.attempt, harmless=kept)
                continue
            self._take_unchanging(file, step, record.attempt)
            records.append(record)
        return records

    def _take_scores(self, file: str, record: CommitRecord) -> None:
        """A score file, compared with its record; a copy that is already the record's is left alone."""
        source_path, target_path = self._source.root_dir / file, self._target.root_dir / file
        expected = Fingerprint(record.bytes, record.sha256)
        place = (file, record.step, record.attempt)
        try:
            local = fingerprint(self._target.root_dir, target_path, self._ledger.progress.advance)
        except CorruptError:  # a link in the copy's place
            local = None

        def count(npz: Path) -> None:
            try:
                self._ledger.scores[file] = self._count(npz, file, record.sha256)
            except (CorruptError, SchemaVersionError) as error:
                raise _RefusedError(error.reason) from None

        try:
            if local == expected:
                count(target_path)
                self._ledger.add(file, expected, record.step, record.attempt)
                self._compare_source_size(file, record)
            else:
                advance = self._ledger.progress.advance if local is None else _ignore
                self._copy(*place, expected=expected, accept=count, advance=advance)
        except _RefusedError as refused:
            self._ledger.find(Problem.CORRUPT, file, str(refused), record.step, record.attempt)
        except MismatchError as mismatch:
            check = compare(record, source_path, mismatch.found.sha256, mismatch.found.num_bytes)
            self._ledger.find(Problem(check.status), file, check.reason, record.step, record.attempt)

    def _count(self, npz: Path, file: str, sha256: str) -> ScoreFacts:
        former = self._ledger.former_scores.get(file)
        if former is not None and former.sha256 == sha256:
            return former
        from launcher.scores import count_scores  # numpy

        return count_scores(npz, sha256)

    def _compare_source_size(self, file: str, record: CommitRecord) -> None:
        """Say so where the source of a good copy has visibly lost its content; it is not read for that."""
        try:
            num_bytes = (self._source.root_dir / file).lstat().st_size
        except OSError:
            return  # pruned after it was collected, perhaps
        if num_bytes != record.bytes:
            reason = f"has {num_bytes} bytes, its record says {record.bytes}"
            self._ledger.find(Problem.TORN, file, reason, record.step, record.attempt, harmless=True)

    def _take_unchanging(self, file: str, step: int | None = None, attempt: int | None = None) -> None:
        """A file that is written once: a good copy of other content is kept, and the difference told."""
        local = self._ledger.local(file)
        if local is not None and local == fingerprint(self._source.root_dir, self._source.root_dir / file):
            self._ledger.add(file, local, step, attempt)
        elif self._ledger.keep(file):
            reason = "differs from the one collected before, which is kept; such a file never changes"
            self._ledger.find(Problem.FOREIGN, file, reason, step, attempt)
        else:
            self._copy(file, step, attempt)

    def _take_changing(self, file: str, attempt: int | None = None, *, only_grows: bool = False) -> None:
        """The file as it is now, if there is one."""
        try:
            found = fingerprint(self._source.root_dir, self._source.root_dir / file)
        except RunDirError as error:
            self._ledger.find_error(error, file, attempt=attempt)
            return
        if found is None:
            return
        local = self._ledger.local(file)
        if found == local:
            self._ledger.add(file, found, None, attempt)
        elif only_grows and local and found.num_bytes < local.num_bytes and self._ledger.keep(file):
            reason = f"has {found.num_bytes} bytes and had {local.num_bytes} before; it should only grow"
            self._ledger.find(Problem.TORN, file, reason, None, attempt, harmless=True)
        else:
            self._copy(file, None, attempt)

    def _copy(
        self,
        file: str,
        step: int | None,
        attempt: int | None,
        *,
        expected: Fingerprint | None = None,
        accept: Callable[[Path], None] = _ignore,
        advance: Advance = _ignore,
    ) -> None:
        """Copy a file; trouble with the source is a finding, trouble with the results ends the collect."""
        root_dir, target_path = self._source.root_dir, self._target.root_dir / file
        try:
            found = copy_file(
                root_dir, root_dir / file, target_path, expected=expected, accept=accept, advance=advance
            )
        except FileNotFoundError:
            self._ledger.find(Problem.MISSING, file, "the file is not there", step, attempt)
        except (CorruptError, StorageError) as error:
            if error.path != root_dir / file:
                raise
            self._ledger.find_error(error, file, step, attempt)
        else:
            self._ledger.add_copied(file, found, step, attempt)

    def _name_missing_steps(
        self, lineage: Mapping[int, CommitRecord], attempts: Sequence[AttemptRecord]
    ) -> None:
        why = _why_missing(attempts)
        for step in range(1, self._num_total_steps + 1):
            if step in lineage or self._ledger.has_finding(step):
                continue
            half = self._source.step_npz(step).exists()
            reason = (
                "its score file is there without a commit record; " + why if half else "not committed; " + why
            )
            last = attempts[-1].number if attempts else None
            self._ledger.find(
                Problem.MISSING, _name(self._source.step_record(step), self._source), reason, step, last
            )


def _total_steps(run_spec: RunSpec, source: RunPaths) -> int:
    training = run_spec.spec.get("training")
    total = training.get("total_steps") if isinstance(training, dict) else None
    if type(total) is not int or total < 1:
        raise CorruptError(source.run_json, "its spec does not say how many steps the run has")
    return total


def _why_missing(attempts: Sequence[AttemptRecord]) -> str:
    if not attempts:
        return "no attempt has started"
    last = attempts[-1]
    if last.exit_code is None:
        return f"attempt {last.number} has not ended, or was killed before it could say so"
    return f"attempt {last.number} ended: {describe(last.exit_code)}"


def _name(path: Path | None, paths: RunPaths) -> str:
    return "" if path is None else path.relative_to(paths.root_dir).as_posix()
