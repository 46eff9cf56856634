"""Random faults against runs on a control plane, and what must hold after each of them."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from influence.rundir import RunPaths, committed_steps, verify_step
from tests.cluster.bench.api import Json, tolerated
from tests.cluster.bench.bench import Bench
from tests.cluster.bench.images import make_image
from tests.cluster.bench.namespace import is_running
from tests.cluster.bench.proxy import Fault, Proxy
from tests.cluster.bench.waiting import until
from tests.cluster.quick_launcher import Command, Ended, QuickLauncher
from tests.cluster.user import User

NAMES = tuple(f"infl-chaos-{letter}" for letter in "abcdef")
NODES = ("chaos-0", "chaos-1")
TOTAL_STEPS = 3
OTHER_SPEC = ("--set", "training.learning_rate=0.5")
_MAX_UNDER_WAY = 3
# Done, usage of a state that does not allow it, conflict, backend, and how a run ended.
_CODES = {0, 2, 4, 5, 100, 101, 102, 103}
_ENDED = ("Complete", "Failed")
_SETTLED = ("SUCCEEDED", "FAILED", "CANCELLED")

_TRAIN = """#!{python}
import os, sys
os.execv({python!r}, [{python!r}, {trainer!r}, {witness!r}, sys.argv[4]])
"""


@dataclass
class Chaos:
    """A user, a launcher behind a proxy, and an order of events that a seed decides."""

    bench: Bench
    user: User
    launcher: QuickLauncher
    proxy: Proxy
    seed: int
    random: random.Random = field(init=False)
    witness: Path = field(init=False)
    image: str = field(init=False)
    under_way: list[tuple[Command, Callable[[Ended], None]]] = field(default_factory=list)
    submitted: dict[str, set[bool]] = field(default_factory=dict)
    """Run -> whether the other spec's submit, the plain spec's, was ever answered with success."""
    records: dict[tuple[str, int], str] = field(default_factory=dict)
    """(run, step) -> the digest of its scores, once seen."""
    lost: str | None = None
    quota: str | None = None
    log: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.witness = self.user.home / "witness"
        self.witness.mkdir()
        self.image = f"bench/{self.user.namespace.name}:1"
        trainer = Path(__file__).with_name("chaos_trainer.py")
        script = _TRAIN.format(python=sys.executable, trainer=str(trainer), witness=str(self.witness))
        make_image(self.bench.folder, self.image, {"python": script})

    # Events

    def events(self) -> Iterator[str]:
        """One fault or order at each step, by its name."""
        weights: dict[Callable[[], None], int] = {
            self.submit: 26, self.submits_at_once: 10, self.cancel: 9, self.suspend: 8, self.resume: 9,
            self.kill_trainer: 9, self.terminate_trainer: 7, self.evict: 6, self.delete_pod: 6,
            self.kill_launcher: 14, self.spoil_requests: 34, self.toggle_quota: 4, self.ask: 6,
        }  # fmt: skip
        while True:
            event = self.random.choices([*weights], [*weights.values()])[0]
            event()
            yield event.__name__

    def submit(self) -> None:
        other = self.random.random() < 0.2
        self.order(*self.submit_words(self._name(), other=other))

    def submits_at_once(self) -> None:
        """Now and then of two specs."""
        name, num_others = self._name(), self.random.choice([0, 0, 0, 1])
        started = [self.start(*self.submit_words(name, other=number < num_others)) for number in range(3)]
        for command, check in started:
            check(command.wait())

    def cancel(self) -> None:
        self.order("cancel", self._name(), "--timeout", self.random.choice(["0", "3"]))

    def suspend(self) -> None:
        self.order("suspend", self._name(), "--timeout", self.random.choice(["0", "3"]))

    def resume(self) -> None:
        self.order("resume", self._name())

    def ask(self) -> None:
        verb = self.random.choice(["explain", "events", "logs", "status"])
        self.order(verb, self._name())

    def kill_launcher(self) -> None:
        """A command dies in its middle."""
        name = self._name()
        words = self.random.choice([self.submit_words(name), ("cancel", name), ("suspend", name)])
        command, _ = self.start(*words)
        time.sleep(self.random.uniform(0, 0.5))
        command.kill()
        command.wait()

    def spoil_requests(self) -> None:
        """What is between the launcher and the server does something to its next requests."""
        kind = self.random.choice(["429", "500", "502", "503", "504", "html", "reset", "delay", "cut"])
        fault = Fault(
            kind,
            after=self.random.random() < 0.5,
            method=self.random.choice([None, "GET", "POST", "POST", "PATCH"]),
            times=self.random.choice([1, 1, 2, 5]),
        )
        self.note(f"  {fault}")
        self.proxy.faults.append(fault)
        self.random.choice([self.submit, self.submit, self.cancel, self.resume])()
        if self.random.random() < 0.5:
            self.proxy.faults.clear()

    def kill_trainer(self) -> None:
        self._signal(signal.SIGKILL)

    def terminate_trainer(self) -> None:
        self._signal(signal.SIGTERM)

    def evict(self) -> None:
        if pod := self._pod():
            with tolerated(404, 409, 429):
                self.user.namespace.evict(pod["metadata"]["name"])

    def delete_pod(self) -> None:
        if pod := self._pod():
            with tolerated(404, 409):
                self.bench.api.delete(f"{self.user.namespace.core}/pods/{pod['metadata']['name']}")

    def restart_apiserver(self) -> None:
        """While commands are in their middle."""
        for _ in range(2):
            self.under_way.append(self.start(*self.submit_words(self._name())))
        self.under_way.append(self.start("cancel", self._name(), "--timeout", "3"))
        time.sleep(self.random.uniform(0, 0.4))
        self.bench.restart_apiserver()

    def toggle_node(self) -> None:
        """A node is lost, or found again."""
        if self.lost is None:
            self.lost = self.random.choice(NODES)
            self.bench.lose_node(self.lost)
        else:
            self.bench.find_node(self.lost)
            self.lost = None

    def toggle_quota(self) -> None:
        if self.quota is None:
            self.quota = self.user.namespace.create_quota("tight", {"requests.nvidia.com/gpu": "2"})
        else:
            self.bench.api.delete(self.quota)
            self.quota = None

    # The launcher

    def submit_words(self, name: str, *, other: bool = False) -> tuple[str, ...]:
        settings = {
            "cluster.image": self.image,
            "cluster.node_selector": "{pool: chaos}",
            "training.total_steps": str(TOTAL_STEPS),
            "wandb.mode": "disabled",
            "hardware.ranks_per_node": "2",
            "hardware.cpus": "2",
            "hardware.memory": "8Gi",
            "retry.backoff_limit": "4",
            "retry.grace_period_s": "5",
        }
        sets = [word for path, value in settings.items() for word in ("--set", f"{path}={value}")]
        return ("submit", "--preset", "smoke", "--name", name, *sets, *(OTHER_SPEC if other else ()))

    def order(self, *words: str) -> None:
        """Start a command, and wait for it or leave it going on."""
        started = self.start(*words)
        if self.random.random() < 0.5:
            self.under_way.append(started)
            self.reap(_MAX_UNDER_WAY)
        else:
            command, check = started
            check(command.wait())

    def start(self, *words: str) -> tuple[Command, Callable[[Ended], None]]:
        submit = words[0] == "submit"
        shown = " ".join(words[:2] if not submit else (*words[:1], words[4], *words[23:]))
        self.note(f"  {shown}")

        def check(ended: Ended) -> None:
            self.note(f"  -> {shown}: {ended.code}")
            self.counts[f"{words[0]} {ended.code}"] += 1
            assert ended.code in _CODES, (ended.code, ended.text)
            assert "Traceback" not in ended.text and "bug in the launcher" not in ended.text, ended.text
            if submit and ended.code == 0:
                self.submitted.setdefault(words[4], set()).add(words[-2:] == OTHER_SPEC)

        return self.launcher.start(*words), check

    def reap(self, num_left: int) -> None:
        while len(self.under_way) > num_left:
            command, check = self.under_way.pop(0)
            check(command.wait())

    # What must hold

    def check(self) -> None:
        """At any moment."""
        self.check_objects()
        for name in NAMES:
            self.check_steps(name)
        overlaps = self.witness / "overlaps"
        assert not overlaps.exists(), f"two pods of a run at once: {overlaps.read_text()}"

    def check_objects(self) -> None:
        namespace = self.user.namespace
        jobs = self.bench.api.items(f"{namespace.batch}/jobs")
        pods = self.bench.api.items(f"{namespace.core}/pods")
        for name in NAMES:
            mine = [job for job in jobs if job["metadata"]["labels"]["infl/run"] == name]
            live = [job["metadata"]["name"] for job in mine if not has_ended(job)]
            assert len(live) <= 1, f"several live Jobs of {name}: {live}"
            expected = {name, *(f"{name}-r{number}" for number in range(2, len(mine) + 1))}
            assert not mine or {job["metadata"]["name"] for job in mine} == expected
            hashes = {job["metadata"]["annotations"]["infl/spec-hash"] for job in mine}
            assert len(hashes) <= 1, f"{name} has Jobs of different specs"
            running = [
                pod["metadata"]["name"]
                for pod in pods
                if pod["metadata"]["labels"].get("infl/run") == name
                and pod["status"].get("phase") not in ("Succeeded", "Failed")
            ]
            # Not even one that is about to go: it may write still.
            assert len(running) <= 1, f"several pods of {name}: {running}"
            assert len(self.submitted.get(name, ())) <= 1, f"{name}: two specs were taken"

    def check_steps(self, name: str) -> None:
        """Those committed once stay as they were."""
        paths = RunPaths.of(self.user.root, name)
        found = {}
        if paths.run_json.exists():
            records = committed_steps(paths, "first")
            found = {step: record.sha256 for step, record in records.items()}
        for step, digest in found.items():
            known = self.records.setdefault((name, step), digest)
            assert known == digest, f"{name}: step {step} was committed again"
        known_steps = {step for run, step in self.records if run == name}
        assert known_steps == set(found), f"{name}: steps {known_steps - set(found)} are gone"

    def check_listed(self) -> None:
        """Every run that was ever submitted with success."""
        ended = self.launcher.run("status", "--output", "json")
        if ended.code != 0:
            assert ended.code == 5, ended.text
            return
        self.counts["lists"] += 1
        listed = {status["run"] for status in ended.document}
        assert set(self.submitted) <= listed, f"lost from status: {set(self.submitted) - listed}"

    # The end

    def calm(self) -> None:
        """Nothing happens any more, and what was taken away is there again."""
        self.proxy.faults.clear()
        self.reap(0)
        if self.lost is not None:
            self.toggle_node()
        if self.quota is not None:
            self.toggle_quota()

    def finish(self) -> None:
        """Left alone, every run comes to rest, and explain says why; what did not succeed does, once it is
        submitted again."""
        for _ in range(8):
            statuses = self._at_rest()
            for status in statuses:
                story = self.launcher.run("explain", status["run"], "--output", "json")
                assert story.code == 0, story.text
                assert story.document["status"]["reason"], story.text
            self.check()
            left = [status for status in statuses if status["state"] != "SUCCEEDED"]
            if not left:
                break
            for status in left:
                name = status["run"]
                if status["state"] == "SUSPENDED":
                    ended = self.launcher.run("resume", name)
                else:
                    assert status["state"] in ("FAILED", "CANCELLED"), status
                    other = True in self.submitted.get(name, ()) or self._is_other(name)
                    ended = self.launcher.run(*self.submit_words(name, other=other))
                assert ended.code == 0, ended.text
        assert {status["state"] for status in statuses} == {"SUCCEEDED"}, statuses
        for status in statuses:
            self.check_complete(status["run"])

    def check_complete(self, name: str) -> None:
        """Each step is there, whole, and was committed by one attempt only."""
        paths = RunPaths.of(self.user.root, name)
        records = committed_steps(paths)
        assert sorted(records) == list(range(1, TOTAL_STEPS + 1))
        for record in records.values():
            assert verify_step(paths, record).status == "ok", record
        assert not (paths.root_dir / "replays").exists(), f"{name} computed a step twice"

    def _at_rest(self) -> list[Json]:
        def settled() -> list[Json] | None:
            ended = self.launcher.run("status", "--output", "json")
            assert ended.code == 0, ended.text
            states = {status["state"] for status in ended.document}
            return ended.document if states <= {*_SETTLED, "SUSPENDED"} else None

        return until(settled, "every run has come to rest", timeout_s=90, every_s=0.3)

    def _is_other(self, name: str) -> bool:
        env = self.user.namespace.job(name)["spec"]["template"]["spec"]["containers"][0]["env"]
        document = next(entry["value"] for entry in env if entry["name"] == "INFL_RUN_JSON")
        return '"learning_rate":0.5' in document

    def _name(self) -> str:
        return self.random.choice(NAMES)

    def _pod(self) -> Json | None:
        """One that runs."""
        running = [pod for pod in self.user.namespace.pods("infl/run") if is_running(pod)]
        return self.random.choice(running) if running else None

    def _signal(self, number: signal.Signals) -> None:
        pod = self._pod()
        if pod is None:
            return
        file = self.bench.folder / "pods" / pod["metadata"]["uid"] / "trainer.pid"
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(int(file.read_text()), number)

    def note(self, text: str) -> None:
        self.log.append(text)


def has_ended(job: Json) -> bool:
    """Whether nothing of a Job will run any more."""
    conditions = job.get("status", {}).get("conditions") or []
    if any(c["type"] in _ENDED and c["status"] == "True" for c in conditions):
        return True
    cancelled = "infl/cancelled-at" in job["metadata"]["annotations"]
    return cancelled and job["spec"].get("suspend") is True
