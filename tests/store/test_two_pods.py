"""Two pods at once on two disks that know nothing of each other: one hangs at any request, the other goes on.

Who hangs may have just looked at the fence, so it can go on for one request after the other has taken over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from influence.rundir import FencedError, claim_attempt, committed_steps
from influence.store.run_store import RunStore

from .conftest import stored
from .pod import NUM_STEPS, Pod
from .s3_server import Request, S3Server
from .test_kill import assert_one_valid_record_a_step

NEVER = 10**9
KEYS = ("AKIAPODONEPODONEPOD1", "AKIAPODTWOPODTWOPOD2")


class Turns:
    """Pod 0 to its i-th request; pod 1 to its j-th; pod 0 to its end; pod 1 to its end."""

    def __init__(
        self,
        server: S3Server,
        pods: list[Callable[[], Pod]],
        monkeypatch: pytest.MonkeyPatch,
        hang_at: tuple[int, int],
        counts: Callable[[Request], bool],
    ) -> None:
        self._counts = counts
        self.num_requests = [0, 0]
        self.outcomes: list[BaseException | None] = [None, None]
        self._hang_at = hang_at
        self._hangs = [threading.Event(), threading.Event()]
        self._may_go_on = [threading.Event(), threading.Event()]
        server.between.before = self._before
        lives = []
        for number in (0, 1):
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEYS[number])
            lives.append(pods[number]())
        self._threads = [threading.Thread(target=self._live, args=(n, lives[n])) for n in (0, 1)]
        self.pods = lives
        self._threads[0].start()
        self._hangs[0].wait(30)
        self._threads[1].start()
        self._hangs[1].wait(30)
        for number in (0, 1):
            self._may_go_on[number].set()
            self._threads[number].join(30)
            assert not self._threads[number].is_alive()
        server.between.clear()

    def _live(self, number: int, pod: Pod) -> None:
        try:
            pod.live()
        except Exception as error:
            self.outcomes[number] = error
        finally:
            self._hangs[number].set()

    def _before(self, request: Request) -> None:
        number = next((n for n in (0, 1) if KEYS[n] in request.headers.get("authorization", "")), None)
        if number is None:
            return
        self.num_requests[number] += self._counts(request)
        if self._counts(request) and self.num_requests[number] == self._hang_at[number]:
            self._hangs[number].set()
            self._may_go_on[number].wait(30)


def assert_nothing_is_written_over(requests: list[Request]) -> None:
    claimed: set[str] = set()
    for request in requests:
        if request.method != "PUT":
            continue
        is_conditional = request.headers.get("if-none-match") == "*"
        if request.key.startswith(("steps/step_", "run.json")):
            assert is_conditional, request.key
        if request.key.startswith("attempts/") and request.key not in claimed:
            claimed.add(request.key)
            assert is_conditional, request.key


def check(turns: Turns, run: RunStore) -> set[str]:
    """What became of the two; all is well in the store."""
    first = assert_one_valid_record_a_step(run)
    assert len(first) == NUM_STEPS
    for pod, outcome in zip(turns.pods, turns.outcomes, strict=True):
        if isinstance(outcome, FencedError):
            assert pod.attempt is not None
            assert outcome.by > outcome.attempt == pod.attempt.number
        else:
            assert outcome is None, outcome
    # Whoever was not stopped has every step that it computed in the store, whichever is the first.
    for pod, outcome in zip(turns.pods, turns.outcomes, strict=True):
        if outcome is None and pod.attempt is not None:
            assert pod.commits.unsent_steps() == []
    assert None in turns.outcomes
    return {"done" if outcome is None else "fenced" for outcome in turns.outcomes}


def two_fresh_pods(on_a_fresh_disk: Callable[[], RunStore]) -> list[Callable[[], Pod]]:
    return [lambda: Pod(on_a_fresh_disk(), same_bytes=False)] * 2


def run_turns(
    server: S3Server,
    on_a_fresh_disk: Callable[[], RunStore],
    monkeypatch: pytest.MonkeyPatch,
    hang_at: tuple[int, int],
    counts: Callable[[Request], bool] = lambda request: request.changes,
) -> tuple[Turns, set[str]]:
    store = on_a_fresh_disk()
    store.objects.delete(list(stored(store.objects)))
    server.between.requests.clear()
    turns = Turns(server, two_fresh_pods(on_a_fresh_disk), monkeypatch, hang_at, counts)
    requests = list(server.between.requests)
    seen = check(turns, on_a_fresh_disk())
    assert_nothing_is_written_over(requests)
    return turns, seen


@pytest.mark.parametrize(
    "counts",
    [
        pytest.param(lambda request: request.changes, id="before a change"),
        pytest.param(lambda request: not request.changes, id="before a look", marks=pytest.mark.slow),
    ],
)
def test_one_that_hangs_anywhere_is_fenced_or_was_done(
    server: S3Server,
    on_a_fresh_disk: Callable[[], RunStore],
    monkeypatch: pytest.MonkeyPatch,
    counts: Callable[[Request], bool],
) -> None:
    outcomes: set[str] = set()
    for i in range(1, NEVER):
        turns, seen = run_turns(server, on_a_fresh_disk, monkeypatch, (i, NEVER), counts)
        outcomes |= seen
        if turns.num_requests[0] < i:
            break
    assert outcomes == {"done", "fenced"}


@pytest.mark.slow
def test_two_that_hang_by_turns(
    server: S3Server, on_a_fresh_disk: Callable[[], RunStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(1, NEVER):
        for j in range(1, NEVER):
            turns, _ = run_turns(server, on_a_fresh_disk, monkeypatch, (i, j))
            if turns.num_requests[1] < j:
                break
        if turns.num_requests[0] < i:
            break


def test_eight_claims_at_once_on_eight_disks_get_eight_numbers(
    on_a_fresh_disk: Callable[[], RunStore],
) -> None:
    numbers: list[int] = []

    def claim(run: RunStore) -> None:
        numbers.append(
            claim_attempt(run.paths, pod=run.paths.root_dir.parent.name, reserve=run.reserve).number
        )

    threads = [threading.Thread(target=claim, args=(on_a_fresh_disk(),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))
    assert on_a_fresh_disk().attempt_numbers() == list(range(1, 9))


def test_the_later_attempt_reads_what_the_sleeper_finished(
    server: S3Server, on_a_fresh_disk: Callable[[], RunStore]
) -> None:
    """The sleeper's NPZ arrives when the later attempt has computed the step: that one is the replay."""
    sleeper, later = (Pod(on_a_fresh_disk(), same_bytes=False) for _ in range(2))
    sleeper.restore_and_claim()
    sleeper.commit(1)
    record = committed_steps(sleeper.paths)[1]
    later.restore_and_claim()
    later.commit(1)
    # It had looked at the fence before, and hung in the middle of its commit.
    sleeper.run.objects.put(sleeper.run.announcement(record), sleeper.paths.step_record(1).read_bytes())
    sleeper.run.objects.create("steps/step_000001.npz", sleeper.paths.step_npz(1).read_bytes())
    later.commits.send()
    reader = on_a_fresh_disk()
    assert assert_one_valid_record_a_step(reader)[1].attempt == 1
    assert committed_steps(reader.paths)[1].attempt == 2
    assert committed_steps(reader.paths)[1].replay
    with pytest.raises(FencedError):
        sleeper.commits.send()


def test_an_npz_that_nobody_announced_is_named(on_a_fresh_disk: Callable[[], RunStore]) -> None:
    pod = Pod(on_a_fresh_disk())
    pod.restore_and_claim()
    pod.run.objects.put("steps/step_000001.npz", b"foreign")
    pod.commit(1)
    with pytest.raises(Exception, match="no attempt announced it"):
        pod.commits.send()
    assert pod.run.objects.read("steps/step_000001.npz") == b"foreign"


def test_a_replay_of_equal_bytes_leaves_only_its_record(on_a_fresh_disk: Callable[[], RunStore]) -> None:
    first = Pod(on_a_fresh_disk())
    first.restore_and_claim()
    first.commit(1)
    first.commits.send()
    second = Pod(on_a_fresh_disk())
    assert second.restore_and_claim() == [2]
    second.commit(1)  # no checkpoint: it starts from scratch
    second.commits.send()
    keys = stored(second.run.objects)
    assert "replays/attempt-0002/step_000001.json" in keys
    assert "replays/attempt-0002/step_000001.npz" not in keys
    reader = on_a_fresh_disk()
    assert_one_valid_record_a_step(reader)
    record = committed_steps(reader.paths)[1]
    assert (record.attempt, record.replay, record.equal) == (2, True, True)
