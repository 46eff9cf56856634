"""A pod that is killed at any request that changes the store, and another on an empty disk that goes on.

Killed means here: from some request on the store hears no more of it. Real processes and a real SIGKILL are
in test_parent_and_store.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from influence.rundir import CommitRecord, committed_steps, verify_step
from influence.store.errors import StoreConfigError
from influence.store.objects import Objects
from influence.store.restore import Restore
from influence.store.run_store import RunStore

from .conftest import stored
from .pod import NUM_STEPS, Pod
from .s3_server import Answer, Request, S3Server

DEAD = Answer(418, "Dead")


class Death:
    """The store stops to hear of its client at a changing request, before or after carrying it out."""

    def __init__(self, server: S3Server, number: int, *, carried_out: bool) -> None:
        self.is_dead = False
        self.num_changes = 0
        self._fatal: Request | None = None

        def before(request: Request) -> Answer | None:
            if self.is_dead:
                return DEAD
            if request.changes:
                self.num_changes += 1
                if self.num_changes == number:
                    self._fatal = request
                    if not carried_out:
                        self.is_dead = True
                        return DEAD
            return None

        def after(request: Request) -> Answer | None:
            if request is self._fatal:
                self.is_dead = True
                return DEAD
            return None

        server.between.before, server.between.after = before, after


def assert_one_valid_record_a_step(run: RunStore) -> dict[int, CommitRecord]:
    """As a reader sees it who copies the whole store to an empty disk."""
    for key, data in stored(run.objects).items():
        path = run.paths.root_dir / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    first = committed_steps(run.paths, "first")
    for record in (*first.values(), *committed_steps(run.paths).values()):
        assert verify_step(run.paths, record).status == "ok", record
    assert list(first) == list(committed_steps(run.paths)) == list(range(1, len(first) + 1))
    return first


def num_changes(server: S3Server, on_a_fresh_disk: Callable[[], RunStore]) -> int:
    death = Death(server, 10**9, carried_out=True)
    Pod(on_a_fresh_disk()).live()
    server.between.clear()
    return death.num_changes


@pytest.mark.parametrize("carried_out", [False, True])
@pytest.mark.parametrize("same_bytes", [pytest.param(True, marks=pytest.mark.slow), False])
def test_killed_at_any_request_the_run_goes_on_from_an_empty_disk(
    server: S3Server, on_a_fresh_disk: Callable[[], RunStore], carried_out: bool, same_bytes: bool
) -> None:
    total = num_changes(server, on_a_fresh_disk)
    assert total >= 18
    run = on_a_fresh_disk()
    for number in range(1, total + 1):
        run.objects.delete(list(stored(run.objects)))
        death = Death(server, number, carried_out=carried_out)
        with pytest.raises(StoreConfigError, match=r"Dead|418"):
            Pod(on_a_fresh_disk(), same_bytes=same_bytes).live()
        assert death.is_dead, number
        server.between.clear()
        before = stored(run.objects)
        next_one = Pod(on_a_fresh_disk(), same_bytes=same_bytes)
        next_one.live()
        after = stored(run.objects)
        lasting = {key for key in before if key.startswith(("steps/step_", "replays/", "run.json"))}
        assert {key: after.get(key) for key in lasting} == {key: before[key] for key in lasting}, number
        first = assert_one_valid_record_a_step(on_a_fresh_disk())
        assert len(first) == NUM_STEPS, number
        if next_one.attempt:  # otherwise all was done, and nothing is touched
            assert not [key for key in after if key.startswith("steps/.")], number
        attempts = [json.loads(after[key]) for key in after if key.startswith("attempts/")]
        assert [attempt["number"] for attempt in attempts] == list(range(1, len(attempts) + 1))


def test_a_finished_run_claims_nothing(server: S3Server, on_a_fresh_disk: Callable[[], RunStore]) -> None:
    Pod(on_a_fresh_disk()).live()
    server.between.requests.clear()
    again = Pod(on_a_fresh_disk())
    assert again.restore_and_claim() == []
    assert again.attempt is None
    assert not [request for request in server.between.requests if request.changes]
    assert not [request for request in server.between.requests if request.key.endswith(".npz")]


def test_a_resume_has_the_newest_checkpoint_and_its_lineage(on_a_fresh_disk: Callable[[], RunStore]) -> None:
    first = Pod(on_a_fresh_disk())
    first.restore_and_claim()
    first.commit(1)
    first.commits.send()
    first.save(1)
    first.checkpoints.send()
    second = Pod(on_a_fresh_disk())
    assert second.restore_and_claim() == [2]
    assert second.resumed_from == 1
    second.commit(2)
    second.commits.send()
    record = assert_one_valid_record_a_step(on_a_fresh_disk())[2]
    assert [tuple(segment) for segment in record.lineage] == [(1, 1, 1), (2, 2, 2)]


def test_what_only_the_disk_of_the_killed_pod_had_is_computed_again(
    on_a_fresh_disk: Callable[[], RunStore],
) -> None:
    """And on that very disk it is set aside, not lost."""
    run = on_a_fresh_disk()
    killed = Pod(run, same_bytes=False)
    killed.restore_and_claim()
    killed.commit(1)
    npz = run.paths.step_npz(1).read_bytes()
    next_one = Pod(run, same_bytes=False)
    assert next_one.restore_and_claim() == [1, 2]
    assert (run.paths.root_dir / "unsent" / "steps" / "step_000001.npz").read_bytes() == npz
    next_one.commit(1)
    next_one.commits.send()
    assert assert_one_valid_record_a_step(on_a_fresh_disk())[1].attempt == 2


def test_a_second_look_fetches_only_what_is_new(
    server: S3Server, objects: Objects, on_a_fresh_disk: Callable[[], RunStore]
) -> None:
    Pod(on_a_fresh_disk()).live()
    restore = Restore(on_a_fresh_disk())
    restore.fetch()
    server.between.requests.clear()
    restore.fetch()
    assert {request.query.split("&")[0] for request in server.between.requests} == {"list-type=2"}
