from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from influence.rundir import CorruptError, RunDirError, RunPaths, StepArrays, claim_attempt, decode, load_step

from .steps import commit, step_arrays, writer


def loaded(paths: RunPaths, arrays: StepArrays):
    writer(paths, claim_attempt(paths)).commit(1, arrays, timings={}, metrics={})
    return load_step(paths.root_dir, 1)


def test_rows(paths: RunPaths) -> None:
    arrays = step_arrays(lengths=(2, 0, 3))
    view = loaded(paths, arrays)
    rows = list(view.rows())
    assert view.record.rows == len(rows) == 3
    np.testing.assert_array_equal(rows[0].scores, arrays.scores[:2])
    np.testing.assert_array_equal(rows[2].scores, arrays.scores[2:])
    np.testing.assert_array_equal(rows[2].token_ids, arrays.token_ids[2:])
    np.testing.assert_array_equal(rows[2].positions, [0, 1, 2])
    np.testing.assert_array_equal(rows[2].advantages, [arrays.advantages[2]] * 3)
    np.testing.assert_allclose(rows[0].log_probs, arrays.log_probs[:2], rtol=1e-3)
    assert len(rows[1].scores) == len(rows[1].positions) == len(rows[1].advantages) == 0
    for i, row in enumerate(rows):
        assert (row.row_id, row.session_id) == (i, arrays.session_id[i])
        assert row.prompt_index == arrays.prompt_index[i]
        assert (row.uid, row.group_id, row.response_length) == (f"uid-{i}", i // 2, arrays.response_length[i])
        assert (row.reward, row.accepted, row.scored) == (arrays.reward[i], arrays.accepted[i], True)


def test_the_padded_view_has_each_score_at_its_token_and_nan_elsewhere(paths: RunPaths) -> None:
    arrays = replace(
        step_arrays(lengths=(2, 0, 3)),
        scores=np.array([1, 2, 3, np.nan, 5], dtype=np.float32),
        positions=np.array([0, 3, 1, 2, 4]),
        response_length=np.array([4, 6, 5]),
    )
    nan = np.nan
    expected = [[1, nan, nan, 2, nan, nan], [nan] * 6, [nan, 3, nan, nan, 5, nan]]
    padded = loaded(paths, arrays).padded()
    assert padded.dtype == np.float32
    np.testing.assert_array_equal(padded, np.array(expected, dtype=np.float32))


def test_the_padded_view_leaves_the_scores_of_prompts_out(paths: RunPaths) -> None:
    arrays = replace(
        step_arrays(lengths=(3, 2)),
        scores=np.array([1, 2, 3, 4, 5], dtype=np.float32),
        positions=np.array([-2, -1, 0, -1, 1]),
        response_length=np.array([1, 2]),
    )
    view = loaded(paths, arrays)
    np.testing.assert_array_equal(view.padded(), np.array([[3, np.nan], [np.nan, 5]], dtype=np.float32))
    assert [row.positions.tolist() for row in view.rows()] == [[-2, -1, 0], [-1, 1]]


def test_a_view_without_optional_columns_or_rows(paths: RunPaths) -> None:
    bare = replace(step_arrays(lengths=(1,)), token_ids=None, log_probs=None, advantages=None)
    (row,) = loaded(paths, bare).rows()
    assert row.token_ids is row.log_probs is row.advantages is None
    writer(paths, claim_attempt(paths)).commit(2, step_arrays(lengths=()), timings={}, metrics={})
    empty = load_step(paths.root_dir, 2, "first")
    assert list(empty.rows()) == [] and empty.padded().shape == (0, 0)


def test_the_lineage_decides_whose_step_is_loaded(paths: RunPaths) -> None:
    for seed in (1, 2):
        commit(paths, claim_attempt(paths), 1, seed)
    for lineage, seed in (("first", 1), ("final", 2)):
        view = load_step(paths, 1, lineage)
        assert view.record.attempt == seed
        np.testing.assert_array_equal(view.arrays.scores, step_arrays(seed).scores)


def test_a_step_that_is_not_committed(paths: RunPaths) -> None:
    with pytest.raises(RunDirError, match="step 3 is not committed"):
        load_step(paths, 3)


WORDS = {
    "cut": "is torn: has [0-9]+ bytes",
    "longer": "larger than",
    "altered": "is corrupt: has SHA-256",
    "gone": "is not there",
    "link": "symbolic link",
}


@pytest.mark.parametrize("damage", WORDS)
def test_a_file_that_is_not_what_was_committed_is_never_decoded(
    paths: RunPaths, tmp_path: Path, damage: str
) -> None:
    commit(paths, claim_attempt(paths), 1)
    npz = paths.step_npz(1)
    data = npz.read_bytes()
    if damage in ("gone", "link"):
        npz.rename(tmp_path / "elsewhere.npz")
        if damage == "link":
            npz.symlink_to(tmp_path / "elsewhere.npz")
    else:
        # the time of a ZIP entry: no decoder would mind
        altered = data[:10] + bytes([data[10] ^ 1]) + data[11:]
        decode(altered)
        npz.write_bytes({"cut": data[:-5], "longer": data + b"x", "altered": altered}[damage])
    with pytest.raises(CorruptError, match=WORDS[damage]) as error:
        load_step(paths, 1)
    assert error.value.path == npz


def test_a_foreign_file_with_a_true_digest_is_named_too(paths: RunPaths) -> None:
    """Whoever writes the record can make the digest right; the decoder still believes nothing."""
    import hashlib

    commit(paths, claim_attempt(paths), 1)
    paths.step_npz(1).write_bytes(b"no NPZ")
    document = json.loads(paths.step_record(1).read_text())
    document |= {"bytes": 6, "sha256": hashlib.sha256(b"no NPZ").hexdigest()}
    paths.step_record(1).write_text(json.dumps(document))
    with pytest.raises(CorruptError, match="no NPZ") as error:
        load_step(paths, 1)
    assert error.value.path == paths.step_npz(1)
