"""The trainer's parent as a process, its run in an object store, its disk empty at each start."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from influence.rundir import AttemptRecord, RunPaths, committed_steps, list_attempts
from influence.store.objects import Objects
from influence.store.run_store import RunStore
from tests.trainer.conftest import resolve, run_document

from .conftest import RUN, stored
from .s3_server import ACCESS_KEY, SECRET_KEY, Answer, Request, S3Server
from .test_kill import assert_one_valid_record_a_step
from .test_two_pods import assert_nothing_is_written_over

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 60
NUM_STEPS = 2


@dataclass
class Pods:
    """Starts the parent, each time on an empty disk, and watches over what it says."""

    root: Path
    server: S3Server
    url: str
    spec: dict[str, Any]
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    output: str = ""
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def start(self, *, fresh_disk: bool = True, **environment: str) -> subprocess.Popen[str]:
        if fresh_disk or not self.started:
            self.disk = self.root / f"pod-{next(self._numbers)}"
        self.paths = RunPaths.of(self.disk, RUN)
        self.disk.mkdir(exist_ok=True)
        pod = subprocess.Popen(
            [sys.executable, "-m", "tests.store.parent_of_fake", "--run-dir", str(self.paths.root_dir)],
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "INFL_STORE_URL": self.url,
                "INFL_RUN_JSON": json.dumps(run_document(RUN, self.spec).to_dict()),
                "POD_NAME": f"pod-{len(self.started)}",
                **environment,
            },
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(pod)
        return pod

    def end(self, pod: subprocess.Popen[str]) -> int:
        output, _ = pod.communicate(timeout=TIMEOUT_S)
        self.output += output
        self.last_output = output
        assert "Traceback" not in output, output
        return pod.returncode

    def run(self, *, fresh_disk: bool = True, **environment: str) -> int:
        return self.end(self.start(fresh_disk=fresh_disk, **environment))

    def last_attempt(self) -> AttemptRecord:
        """Of the disk of the last pod."""
        return list_attempts(self.paths)[-1]


@pytest.fixture
def pods(tmp_path: Path, server: S3Server, url: str) -> Iterator[Pods]:
    spec = resolve("smoke", "tiny-cpu", training__total_steps=NUM_STEPS, retry__grace_period_s=30)
    pods = Pods(tmp_path, server, url, spec)
    yield pods
    for pod in pods.started:
        pod.kill()
        pod.wait()
    said = [pods.output, *(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())]
    for secret in (SECRET_KEY, ACCESS_KEY):
        assert not [text for text in said if secret in text]


def in_store(objects: Objects) -> dict[str, bytes]:
    found = stored(objects)
    for secret in (SECRET_KEY, ACCESS_KEY):
        assert not [key for key, data in found.items() if secret.encode() in data]
    return found


def test_a_run_ends_with_everything_in_the_store_and_is_not_begun_again(
    pods: Pods, objects: Objects, server: S3Server
) -> None:
    assert pods.run() == 0, pods.last_output
    found = in_store(objects)
    expected = {
        "run.json", "attempts/0001.json", "logs/attempt-0001.log", "metrics/attempt-0001.jsonl",
        *(f"steps/step_00000{step}.{kind}" for step in (1, 2) for kind in ("npz", "json")),
    }  # fmt: skip
    assert {key for key in found if not key.startswith("checkpoints/")} == expected
    assert "checkpoints/attempt-0001/step_000002.json" in found
    for key in expected:  # the same layout, the same bytes
        assert found[key] == (pods.paths.root_dir / key).read_bytes(), key
    end = json.loads(found["attempts/0001.json"])
    assert (end["exit_code"], end["pod"]) == (0, "pod-0")
    assert b"all steps committed (0)" in found["logs/attempt-0001.log"]
    assert_nothing_is_written_over(server.between.requests)

    server.between.requests.clear()
    assert pods.run(PYTHONPROFILEIMPORTTIME="1") == 0
    assert "all 2 steps are committed, nothing to do" in pods.last_output
    modules = {
        line.rsplit("|", 1)[1].strip() for line in pods.last_output.splitlines() if "import time:" in line
    }
    assert "obstore" in modules
    assert not modules & {"torch", "numpy", "verl", "ray", "transformers", "asyncio"}
    assert not [request for request in server.between.requests if request.changes]
    assert in_store(objects) == found


def test_without_the_variable_no_store_is_imported(pods: Pods) -> None:
    assert pods.run(INFL_STORE_URL="", PYTHONPROFILEIMPORTTIME="1") == 0
    assert "obstore" not in pods.last_output
    assert "influence.train.stored" not in pods.last_output


def kill_at(pods: Pods, server: S3Server, is_it: Callable[[Request, int], bool], *, carried_out: bool) -> int:
    """Kill the pod, with SIGKILL, at one request that changes the store; how many there were before."""
    seen: list[Request] = []
    fatal: list[Request] = []
    pod: subprocess.Popen[str] | None = None

    def kill() -> Answer:
        assert pod is not None
        pod.kill()
        pod.wait()
        return Answer(503)

    def before(request: Request) -> Answer | None:
        if fatal or not request.changes:
            return None
        seen.append(request)
        if is_it(request, len(seen)):
            fatal.append(request)
            return None if carried_out else kill()
        return None

    def after(request: Request) -> Answer | None:
        return kill() if carried_out and fatal and request is fatal[0] else None

    server.between.before, server.between.after = before, after
    pod = pods.start()
    code = pods.end(pod)
    server.between.clear()
    assert code == (-signal.SIGKILL if fatal else 0), pods.last_output
    return len(seen)


def assert_goes_on(pods: Pods, objects: Objects, make_store: Callable[[], RunStore]) -> None:
    before = in_store(objects)
    assert pods.run() == 0, pods.last_output
    after = in_store(objects)
    lasting = [key for key in before if key.startswith(("steps/step_", "replays/", "run.json"))]
    assert {key: after.get(key) for key in lasting} == {key: before[key] for key in lasting}
    assert list(assert_one_valid_record_a_step(make_store())) == [1, 2]


@pytest.mark.parametrize("key", ["steps/step_000001.npz", "steps/step_000002.json", "checkpoints/"])
@pytest.mark.parametrize("carried_out", [False, True])
def test_a_killed_pods_run_goes_on_from_an_empty_disk(
    pods: Pods,
    objects: Objects,
    server: S3Server,
    on_a_fresh_disk: Callable[[], RunStore],
    key: str,
    carried_out: bool,
) -> None:
    kill_at(pods, server, lambda request, _: request.key.startswith(key), carried_out=carried_out)
    assert pods.started[0].returncode == -signal.SIGKILL
    assert_goes_on(pods, objects, on_a_fresh_disk)
    if key == "steps/step_000001.npz" and carried_out:  # the commit was finished in the first's stead
        assert json.loads(objects.read("steps/step_000001.json"))["attempt"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("carried_out", [False, True])
def test_killed_between_any_two_uploads(
    pods: Pods,
    objects: Objects,
    server: S3Server,
    on_a_fresh_disk: Callable[[], RunStore],
    carried_out: bool,
) -> None:
    for number in itertools.count(1):
        objects.delete(list(stored(objects)))
        num_seen = kill_at(pods, server, lambda _, count, n=number: count == n, carried_out=carried_out)  # type: ignore[misc]
        if pods.started[-1].returncode == 0:
            assert num_seen == number - 1 > 15
            return
        assert_goes_on(pods, objects, on_a_fresh_disk)


def orders(pods: Pods, name: str, **by_step: str) -> Path:
    folder = pods.root / name
    folder.mkdir()
    (folder / "orders.json").write_text(
        json.dumps({step.removeprefix("step_"): order for step, order in by_step.items()})
    )
    return folder


def wait_until(condition: Callable[[], object]) -> None:
    give_up_at = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def exists(objects: Objects, key: str) -> bool:
    return any(entry.key == key for entry in objects.list(""))


def test_of_two_pods_on_two_disks_the_later_goes_on_and_the_other_ends_75(
    pods: Pods, objects: Objects, on_a_fresh_disk: Callable[[], RunStore]
) -> None:
    first_orders = orders(pods, "first", step_2="wait")
    first = pods.start(FAKE_ORDERS=str(first_orders))
    wait_until(lambda: exists(objects, "steps/step_000001.json"))
    wait_until((first_orders / "waiting").exists)
    assert pods.run() == 0, pods.last_output
    (first_orders / "go").touch()
    assert pods.end(first) == 75
    assert "attempt 1 is fenced: attempt 2 has taken over" in pods.last_output
    records = assert_one_valid_record_a_step(on_a_fresh_disk())
    assert {step: record.attempt for step, record in records.items()} == {1: 1, 2: 2}
    assert json.loads(objects.read("attempts/0001.json"))["exit_code"] == 75


def test_a_pod_that_is_stopped_sends_what_it_has(
    pods: Pods, objects: Objects, on_a_fresh_disk: Callable[[], RunStore]
) -> None:
    place = orders(pods, "orders", step_2="wait")
    pod = pods.start(FAKE_ORDERS=str(place))
    wait_until((place / "waiting").exists)
    pod.send_signal(signal.SIGTERM)
    assert pods.end(pod) == 75
    assert json.loads(objects.read("attempts/0001.json"))["reason"] == "stopped by SIGTERM"
    assert b"stopped by SIGTERM" in objects.read("logs/attempt-0001.log")
    assert exists(objects, "checkpoints/attempt-0001/step_000001.json")
    assert pods.run() == 0
    assert "child resumes from 1" in pods.last_output
    assert "1 steps committed, checkpoint of step 1" in pods.last_output
    record = assert_one_valid_record_a_step(on_a_fresh_disk())[2]
    assert [tuple(segment) for segment in record.lineage] == [(1, 1, 1), (2, 2, 2)]


def test_what_could_not_be_sent_in_time_is_told(pods: Pods, objects: Objects, server: S3Server) -> None:
    pods.spec["retry"]["grace_period_s"] = 10
    place = orders(pods, "orders", step_2="wait")

    def hang(request: Request) -> Answer | None:
        if request.key.endswith(".npz"):
            wait_until(lambda: pods.started[0].poll() is not None)
        return None

    server.between.before = hang
    pod = pods.start(FAKE_ORDERS=str(place))
    wait_until((place / "waiting").exists)
    pod.send_signal(signal.SIGTERM)
    assert pods.end(pod) == 75
    expected = "stopped by SIGTERM; not in the store: step 1, the checkpoint of step 1"
    assert pods.last_attempt().reason == expected
    assert expected in pods.last_output
    assert json.loads(objects.read("attempts/0001.json"))["reason"] == expected
    assert committed_steps(pods.paths)  # on the disk it was, but that is not what counts


def test_a_slow_and_failing_store_is_survived(
    pods: Pods, server: S3Server, on_a_fresh_disk: Callable[[], RunStore]
) -> None:
    numbers = itertools.count()

    def fail_often(request: Request) -> Answer | None:
        time.sleep(0.01)
        return Answer(503, "SlowDown") if next(numbers) % 5 == 0 else None

    def lose_some(request: Request) -> Answer | None:
        return Answer(500, "InternalError") if next(numbers) % 7 == 0 else None

    server.between.before, server.between.after = fail_often, lose_some
    assert pods.run() == 0, pods.last_output
    server.between.clear()
    records = assert_one_valid_record_a_step(on_a_fresh_disk())
    assert {step: record.attempt for step, record in records.items()} == {1: 1, 2: 1}


AT_THE_START = {
    "denied": (Answer(403, "AccessDenied"), 78, "access is denied (AccessDenied)"),
    "wrong key": (Answer(403, "SignatureDoesNotMatch", SECRET_KEY), 78, "the secret key does not fit"),
    "no bucket": (Answer(404, "NoSuchBucket"), 78, "there is no such bucket"),
    "away": (Answer(503, "ServiceUnavailable"), 1, "it answers 503"),
}


@pytest.mark.parametrize(("answer", "code", "words"), AT_THE_START.values(), ids=AT_THE_START)
def test_a_store_that_cannot_be_used_at_the_start(
    pods: Pods, server: S3Server, answer: Answer, code: int, words: str
) -> None:
    server.between.before = lambda request: answer
    assert pods.run(INFL_STORE_PATIENCE_S="0.5") == code
    (line,) = pods.last_output.splitlines()
    assert words in line
    assert pods.url in line
    assert not (pods.paths.root_dir / "attempts").exists()


IN_FLIGHT = {
    "away": (Answer(503, "ServiceUnavailable"), 75, "it answers 503"),
    "full": (Answer(507, "XMinioStorageFull"), 1, "no room is left"),
    "expired": (Answer(400, "ExpiredToken"), 75, "the session token has expired"),
}


@pytest.mark.parametrize(("answer", "code", "words"), IN_FLIGHT.values(), ids=IN_FLIGHT)
def test_a_store_that_goes_away_ends_the_attempt_and_its_reason_says_so(
    pods: Pods, server: S3Server, answer: Answer, code: int, words: str
) -> None:
    place = orders(pods, "orders", step_2="wait")  # the child is stopped, it does not end by itself
    server.between.before = lambda request: answer if request.key.startswith("steps/") else None
    assert pods.run(INFL_STORE_PATIENCE_S="0.5", FAKE_ORDERS=str(place)) == code, pods.last_output
    reason = pods.last_attempt().reason or ""
    assert words in reason
    assert "not in the store: step 1" in reason


def test_a_run_whose_last_step_did_not_reach_the_store_is_not_done(pods: Pods, server: S3Server) -> None:
    server.between.before = lambda request: Answer(503) if request.key == "steps/step_000002.npz" else None
    assert pods.run(INFL_STORE_PATIENCE_S="0.5") == 75
    assert "not in the store: step 2" in (pods.last_attempt().reason or "")


def test_a_store_without_conditional_puts_is_refused_before_anything_is_claimed(
    pods: Pods, objects: Objects, server: S3Server
) -> None:
    def ignore(request: Request) -> Request:
        headers = {name: value for name, value in request.headers.items() if name != "if-none-match"}
        return Request(request.method, request.path, request.query, headers, request.body)

    server.between.before = ignore
    assert pods.run() == 78
    assert "If-None-Match" in pods.last_output
    server.between.clear()
    assert set(stored(objects)) == {"run.json"}


def test_another_run_of_this_name_in_the_store_is_a_conflict(pods: Pods, objects: Objects) -> None:
    assert pods.run() == 0
    before = in_store(objects)
    pods.spec["influence"]["damping"] = 0.5
    assert pods.run() == 78
    assert "influence.damping: 0.1 -> 0.5" in pods.last_output
    assert in_store(objects) == before


@pytest.mark.parametrize(
    ("environment", "code", "words"),
    [
        ({"INFL_STORE_URL": "s3://me:secret@bucket/x"}, 78, "carries credentials"),
        ({"INFL_STORE_URL": "nonsense"}, 78, "no object store can be opened"),
        ({"INFL_STORE_PATIENCE_S": "soon"}, 64, "INFL_STORE_PATIENCE_S is 'soon'"),
    ],
)
def test_wrong_settings(pods: Pods, environment: dict[str, str], code: int, words: str) -> None:
    assert pods.run(**environment) == code
    assert words in pods.last_output
    assert "me:secret" not in pods.last_output


def test_several_nodes_are_refused(pods: Pods) -> None:
    pods.spec["hardware"]["nodes"] = 2
    assert pods.run() == 78
    assert "cluster.storage: claim" in pods.last_output


def test_what_ends_an_attempt_before_the_child_is_in_the_store(pods: Pods, objects: Objects) -> None:
    pods.spec["training"]["no_such_option"] = 1
    assert pods.run() == 78
    assert "no_such_option" in json.loads(objects.read("attempts/0001.json"))["reason"]
    assert b"no_such_option" in objects.read("logs/attempt-0001.log")


def test_the_next_attempt_on_the_same_disk_starts_from_what_the_store_has(
    pods: Pods, objects: Objects, server: S3Server, on_a_fresh_disk: Callable[[], RunStore]
) -> None:
    kill_at(pods, server, lambda request, _: request.key == "steps/step_000001.npz", carried_out=False)
    assert committed_steps(pods.paths)
    assert pods.run(fresh_disk=False) == 0, pods.last_output
    records = assert_one_valid_record_a_step(on_a_fresh_disk())
    assert {step: record.attempt for step, record in records.items()} == {1: 2, 2: 2}
    assert (pods.paths.root_dir / "unsent" / "steps" / "step_000001.json").exists()
