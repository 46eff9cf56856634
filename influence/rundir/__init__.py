"""The run directory: the one contract between the trainer and the launcher (ARCHITECTURE.md has its tree).

Standard library and numpy only. What a status needs (paths, spec, attempts, records, lineage) is imported
with the package; what touches NPZ files needs numpy and is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from influence.rundir.attempts import Attempt, AttemptRecord, claim_attempt, list_attempts, read_attempt
from influence.rundir.clock import parse_time, utc_now
from influence.rundir.errors import (
    ConflictError,
    CorruptError,
    FencedError,
    NotARunError,
    RunDirError,
    RunNameError,
    SchemaVersionError,
    StorageError,
)
from influence.rundir.exits import TrainerExit, Verdict, classify, describe
from influence.rundir.files import read_json, sha256_file, write_atomic, write_json
from influence.rundir.lineage import StepCheck, committed_steps, missing_steps, verify_step
from influence.rundir.metrics import read_metrics
from influence.rundir.names import MAX_RUN_NAME, run_name, validate_new_run_name, validate_run_name
from influence.rundir.paths import RunPaths
from influence.rundir.record import CommitRecord
from influence.rundir.segments import Segment
from influence.rundir.spec import (
    SCHEMA_VERSION,
    RunSpec,
    canonical_json,
    create_run,
    difference,
    read_run,
    spec_hash,
)

if TYPE_CHECKING:
    from influence.rundir.arrays import StepArrays
    from influence.rundir.commit import StepWriter
    from influence.rundir.load import StepRow, StepView, load_step
    from influence.rundir.npz import NPZ_SCHEMA_VERSION, decode, encode

_WITH_NUMPY = {
    "StepArrays": "arrays",
    "StepWriter": "commit",
    "StepRow": "load",
    "StepView": "load",
    "load_step": "load",
    "NPZ_SCHEMA_VERSION": "npz",
    "decode": "npz",
    "encode": "npz",
}

__all__ = [
    "MAX_RUN_NAME",
    "NPZ_SCHEMA_VERSION",
    "SCHEMA_VERSION",
    "Attempt",
    "AttemptRecord",
    "CommitRecord",
    "ConflictError",
    "CorruptError",
    "FencedError",
    "NotARunError",
    "RunDirError",
    "RunNameError",
    "RunPaths",
    "RunSpec",
    "SchemaVersionError",
    "Segment",
    "StepArrays",
    "StepCheck",
    "StepRow",
    "StepView",
    "StepWriter",
    "StorageError",
    "TrainerExit",
    "Verdict",
    "canonical_json",
    "claim_attempt",
    "classify",
    "committed_steps",
    "create_run",
    "decode",
    "describe",
    "difference",
    "encode",
    "list_attempts",
    "load_step",
    "missing_steps",
    "parse_time",
    "read_attempt",
    "read_json",
    "read_metrics",
    "read_run",
    "run_name",
    "sha256_file",
    "spec_hash",
    "utc_now",
    "validate_new_run_name",
    "validate_run_name",
    "verify_step",
    "write_atomic",
    "write_json",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_NUMPY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_NUMPY[name]}"), name)
