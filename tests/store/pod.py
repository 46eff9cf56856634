"""A pod without a trainer: it restores, claims, commits steps and mirrors them, all in one thread."""

from __future__ import annotations

from pathlib import Path

from influence.rundir import Attempt, RunSpec, claim_attempt, create_run, missing_steps
from influence.store import checkpoints
from influence.store.mirror import CheckpointMirror, CommitMirror
from influence.store.restore import Restore
from influence.store.run_store import RunStore
from influence.verl_engine.checkpoints import begin_checkpoint, checkpoint_attempt, newest_checkpoint
from tests.rundir.steps import RUN, SPEC, step_arrays, writer

NUM_STEPS = 2


class Pod:
    """One attempt on a disk of its own.

    Args:
        same_bytes: every attempt computes the same scores; otherwise each its own.
    """

    def __init__(self, run: RunStore, *, same_bytes: bool = True) -> None:
        self.run = run
        self.paths = run.paths
        self._same_bytes = same_bytes
        self.attempt: Attempt | None = None
        self.resumed_from = 0

    def restore_and_claim(self) -> list[int]:
        """The steps that are missing; claims nothing where none is."""
        restore = Restore(self.run)
        restore.fetch()
        spec = RunSpec.new(RUN, SPEC)
        create_run(self.paths, spec)
        if not missing_steps(self.paths, NUM_STEPS):
            return []
        self.run.objects.create("run.json", self.paths.run_json.read_bytes())
        self.attempt = claim_attempt(self.paths, reserve=self.run.reserve)
        restore.fetch()
        restore.finish_announced()
        self.commits = CommitMirror(self.run, self.attempt)
        missing = missing_steps(self.paths, NUM_STEPS)
        if not missing:
            self.finish(0)
            return []
        self.resumed_from = checkpoints.restore(self.run, missing[0], print, lambda: False)
        if self.resumed_from:
            self.attempt.set_resume(
                self.resumed_from, checkpoint_attempt(self.paths.checkpoints_dir, self.resumed_from)
            )
        self.checkpoints = CheckpointMirror(
            self.run, self.attempt, self.commits, lambda: newest_checkpoint(self.paths.checkpoints_dir), 2
        )
        return missing

    def commit(self, step: int) -> None:
        assert self.attempt is not None
        seed = step if self._same_bytes else 100 * self.attempt.number + step
        writer(self.paths, self.attempt).commit(step, step_arrays(seed), timings={}, metrics={})

    def save(self, step: int) -> None:
        """A checkpoint, in verl's order: the tracker is written last."""
        assert self.attempt is not None
        begin_checkpoint(self.paths.checkpoints_dir, step, self.attempt.number)
        folder = self.paths.checkpoints_dir / f"global_step_{step}"
        (folder / "actor").mkdir()
        (folder / "actor" / "model.pt").write_bytes(f"weights {self.attempt.number} {step}".encode() * 100)
        (folder / "data.pt").write_bytes(b"data")
        (self.paths.checkpoints_dir / "latest_checkpointed_iteration.txt").write_text(str(step))

    def live(self) -> None:
        """From the start to the end of the run."""
        if not self.restore_and_claim():
            return
        for step in range(self.resumed_from + 1, NUM_STEPS + 1):
            self.commit(step)
            self.commits.send()
            self.save(step)
            self.checkpoints.send()
        self.finish(0)

    def finish(self, code: int) -> None:
        assert self.attempt is not None
        self.attempt.finish(code, "ended")
        self.commits.send_texts()


def read_weights(checkpoints_dir: Path, step: int) -> bytes:
    return (checkpoints_dir / f"global_step_{step}" / "actor" / "model.pt").read_bytes()[:20]
