"""The books of one collect: which files are verified, what was found wrong, what the score files contain."""

from __future__ import annotations

from contextlib import suppress

from influence.rundir.errors import CorruptError, RunDirError, SchemaVersionError, StorageError
from influence.rundir.paths import RunPaths
from launcher.copying import Fingerprint, fingerprint
from launcher.manifest import FileEntry, Finding, Manifest, Problem, ScoreFacts, read_manifest


class Progress:
    """Told how a collect goes on; does nothing by itself."""

    def waiting(self) -> None:
        """Another collect of this run is at work; this one goes on when it is done."""

    def start(self, num_files: int, num_bytes: int) -> None:
        """So many score files with so many bytes are to be read: those that are there already, too."""

    def advance(self, num_bytes: int) -> None:
        """So much of them was read."""

    def copied(self, entry: FileEntry) -> None:
        """A file was copied and verified."""


class Ledger:
    """What one collect has established so far. Files are named relative to the run, with ``/``.

    Args:
        target: the collected copy. Its former manifest tells a good copy from a damaged one where no commit
            record does.
    """

    def __init__(self, target: RunPaths, progress: Progress) -> None:
        self.progress = progress
        self.copied: list[FileEntry] = []
        self.scores: dict[str, ScoreFacts] = {}
        self._target = target
        self._entries: dict[str, FileEntry] = {}
        self._findings: list[Finding] = []
        self._former: dict[str, FileEntry] = {}
        self.former_scores: dict[str, ScoreFacts] = {}
        with suppress(CorruptError, SchemaVersionError):
            former = read_manifest(target.root_dir)
            if former is not None:
                self._former = {entry.file: entry for entry in former.files}
                self.former_scores = dict(former.scores)

    def local(self, file: str) -> Fingerprint | None:
        """The collected copy of a file as it is now; None where there is none, or a link in its place."""
        try:
            return fingerprint(self._target.root_dir, self._target.root_dir / file)
        except CorruptError:
            return None

    def add(self, file: str, found: Fingerprint, step: int | None, attempt: int | None) -> FileEntry:
        """The collected copy of this file is good."""
        entry = FileEntry(
            file=file, num_bytes=found.num_bytes, sha256=found.sha256, step=step, attempt=attempt
        )
        self._entries[file] = entry
        return entry

    def add_copied(self, file: str, found: Fingerprint, step: int | None, attempt: int | None) -> None:
        """The same, of a file that was copied just now."""
        self.copied.append(self.add(file, found, step, attempt))
        self.progress.copied(self.copied[-1])

    def keep(self, file: str) -> bool:
        """Whether a former collect verified this file and its copy is still the same; then it stays."""
        former = self._former.get(file)
        if former is None or self.local(file) != former.fingerprint:
            return False
        self._entries[file] = former
        if file in self.former_scores:
            self.scores.setdefault(file, self.former_scores[file])
        return True

    def find(
        self,
        problem: Problem,
        file: str,
        reason: str,
        step: int | None = None,
        attempt: int | None = None,
        *,
        harmless: bool = False,
    ) -> None:
        """Something is wrong with a file."""
        finding = Finding(
            problem=problem, file=file, reason=reason, step=step, attempt=attempt, harmless=harmless
        )
        self._findings.append(finding)

    def find_error(
        self, error: RunDirError, file: str, step: int | None = None, attempt: int | None = None
    ) -> None:
        """The source's file cannot be used, as ``error`` says; a good copy of it stays."""
        problem = Problem.CORRUPT
        if isinstance(error, SchemaVersionError) or (error.path is not None and error.path.is_symlink()):
            problem = Problem.FOREIGN
        elif isinstance(error, StorageError):
            problem = Problem.MISSING
        self.find(problem, file, error.reason, step, attempt, harmless=self.keep(file))

    def has_finding(self, step: int) -> bool:
        return any(finding.step == step and not finding.harmless for finding in self._findings)

    def keep_former(self) -> None:
        """Files of former collects that the source no longer has stay, if they are still good."""
        told = {finding.file for finding in self._findings}
        for file, entry in self._former.items():
            if file not in self._entries and not self.keep(file) and file not in told:
                reason = "was collected before; the copy is gone or altered, and the run no longer has it"
                self.find(Problem.MISSING, file, reason, entry.step, entry.attempt)

    def manifest(
        self, *, run: str, spec_hash: str, source: str, num_total_steps: int, collected_at: str
    ) -> Manifest:
        """The books as a manifest, in an order that depends on nothing but their content."""
        order = sorted(self._findings, key=lambda f: (f.step or 0, f.attempt or 0, f.file, f.problem))
        return Manifest(
            run=run,
            spec_hash=spec_hash,
            source=source,
            collected_at=collected_at,
            num_total_steps=num_total_steps,
            files=tuple(self._entries[file] for file in sorted(self._entries)),
            findings=tuple(order),
            scores={file: self.scores[file] for file in sorted(self.scores) if file in self._entries},
        )
