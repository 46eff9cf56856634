from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest

from influence import rundir
from influence.rundir import (
    ConflictError,
    CorruptError,
    FencedError,
    NotARunError,
    RunDirError,
    RunNameError,
    SchemaVersionError,
    StorageError,
)

PLACE = Path("/runs/infl-a/run.json")
EXAMPLES = [
    RunNameError(None, "no name", "use another"),
    NotARunError(PLACE, "no run", "look elsewhere"),
    SchemaVersionError(PLACE, "it has", 7, 1),
    CorruptError(PLACE, "is torn"),
    ConflictError(PLACE, ["a: 1 -> 2", "b: 1 -> 2", "c: 1 -> 2", "d: 1 -> 2"]),
    FencedError(PLACE, 1, 3),
    StorageError.from_os_error(OSError(errno.ENOSPC, "No space left on device"), PLACE, "writing"),
]


def test_the_examples_are_all_kinds() -> None:
    own = {kind for kind in RunDirError.__subclasses__() if kind.__module__ == RunDirError.__module__}
    assert {type(error) for error in EXAMPLES} == own


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_every_error_says_where_why_and_what_next(error: RunDirError) -> None:
    assert error.reason and error.next_step
    assert error.reason in str(error) and error.next_step in str(error)
    assert error.path is None or str(error).startswith(f"{PLACE}: ")


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_survive_the_border_between_two_processes(error: RunDirError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and copy.__dict__ == error.__dict__


def test_what_callers_act_on() -> None:
    assert EXAMPLES[2].found == 7 and EXAMPLES[2].supported == 1
    assert "7" in EXAMPLES[2].reason and "1" in EXAMPLES[2].reason
    assert EXAMPLES[4].difference[3] == "d: 1 -> 2"
    assert (EXAMPLES[5].attempt, EXAMPLES[5].by) == (1, 3)
    assert EXAMPLES[6].errno == errno.ENOSPC and "no space left" in EXAMPLES[6].reason


def test_a_system_error_without_a_wording_of_ours_keeps_the_systems() -> None:
    error = StorageError.from_os_error(OSError(errno.EIO, "Input/output error"), PLACE, "reading")
    assert error.reason == "reading failed: input/output error"


def test_all_public_names_are_there_and_listed() -> None:
    assert sorted(rundir.__all__) == sorted(set(rundir.__all__))
    for name in rundir.__all__:
        assert getattr(rundir, name) is not None
    assert set(rundir._WITH_NUMPY) <= set(rundir.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = rundir.no_such_name
