"""``launcher explain`` and ``launcher events``: the story of every attempt, whoever knows a part of it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from influence.rundir import RunPaths, Verdict, claim_attempt, create_run
from launcher.backends import AttemptFacts, Event
from launcher.backends.attempt_records import merged
from launcher.commands.explain import event_line
from launcher.commands.options import Place
from launcher.group import run as run_launcher
from launcher.progress import moment
from launcher.site import Site
from launcher.states import Phase
from launcher.story import tell
from tests.launcher.fake_backend import FakeBackend, fake_site
from tests.launcher.local_run import LocalRun, launcher, wait_for
from tests.launcher.test_site import RUN, server, some_run, submitted


def facts(pod: str, **fields: Any) -> AttemptFacts:
    return AttemptFacts(where=f"pod {pod} on node gpu-3", pod=pod, **fields)


def explained(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> tuple[str, str]:
    monkeypatch.setattr(Place, "open", lambda *_: site)
    assert run_launcher(["explain", RUN, *words]) == 0
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.fixture
def cluster(tmp_path: Path) -> Site:
    """Three attempts: evicted before it claimed a number, crashed, running; two of them left records."""
    site = submitted(fake_site(tmp_path))
    backend = server(site)
    paths = RunPaths.of(tmp_path, RUN)
    create_run(paths, some_run())
    first = claim_attempt(paths, pod="pod-b", node="gpu-3", started_at="2026-02-21T10:00:00.000+00:00")
    first.finish(3, "CUDA out of memory")
    second = claim_attempt(paths, pod="pod-c", node="gpu-4", started_at="2026-02-21T11:00:00.000+00:00")
    second.set_resume(0)
    backend.objects[RUN][-1].history[:] = [
        facts(
            "pod-a", started_at="2026-02-21T09:00:00.000+00:00", ended_at="2026-02-21T09:30:00.000+00:00",
            ended_by="evicted: the node was low on memory", verdict=Verdict.FREE_RETRY,
        ),
        facts(
            "pod-b", started_at="2026-02-21T10:00:00.000+00:00", exit_code=3, ended_by="failed (exit code 3)",
            verdict=Verdict.CHARGED_RETRY, decision="started again, charged: retry 1 of 2",
        ),
        facts("pod-c", started_at="2026-02-21T11:00:00.000+00:00"),
    ]  # fmt: skip
    backend.logs = {(RUN, 1): b"one\n\x1b[31mtwo\x1b[0m\nthree\n", (RUN, 2): b"goes\x1b[2J on\n"}
    backend.happened = [
        Event(at="2026-02-21T08:59:00Z", about=f"Job {RUN}", reason="SuccessfulCreate", message="made pod-a"),
        Event(
            at="2026-02-21T09:30:00Z", about="Pod pod-a", reason="Evicted", message="low on memory",
            warning=True, count=3,
        ),
    ]  # fmt: skip
    backend.becomes(RUN, Phase.EXECUTING, "the trainer runs")
    return site


def test_both_sides_of_an_attempt_meet_by_the_pod(cluster: Site) -> None:
    story = tell(cluster, RUN, num_lines=2)
    assert [attempt.facts.number for attempt in story.attempts] == [None, 1, 2]
    evicted, crashed, running = story.attempts
    assert (evicted.resumed_from, evicted.log_lines) == (None, ())
    assert crashed.facts.ended_by == "failed (exit code 3): CUDA out of memory"
    assert crashed.facts.ended_at is not None  # the trainer's record has it
    assert (crashed.resumed_from, crashed.log_lines) == (0, ("two", "three"))
    assert (running.facts.ended_by, running.facts.where) == (None, "pod pod-c on node gpu-3")
    assert [event.reason for event in story.warnings] == ["Evicted"]


def test_as_text(cluster: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = explained(cluster, monkeypatch, capsys)
    lines = out.splitlines()
    assert lines[0] == f"{RUN}: RUNNING (the trainer runs)"
    assert "an attempt without a number: pod pod-a on node gpu-3" in lines
    assert "  ended:  evicted: the node was low on memory (not charged)" in lines
    assert "  when:   2026-02-21T09:00:00Z to 2026-02-21T09:30:00Z, 30 min" in lines
    assert "  ended:  failed (exit code 3): CUDA out of memory" in lines
    assert "  then:   started again, charged: retry 1 of 2" in lines
    assert "  log:    one" in lines
    assert "  ended:  it goes on" in lines
    assert "  2026-02-21T09:30:00Z  Pod pod-a: Evicted: low on memory (3 times)" in lines
    assert "\x1b" not in out
    assert "goes\\x1b[2J on" in out


def test_long_lines_are_shortened_to_the_terminal_or_to_200(
    cluster: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server(cluster).logs = {(RUN, 1): b"step:1 - " + b"x" * 5500 + b"\nshort\n"}
    out, _ = explained(cluster, monkeypatch, capsys)
    lines = out.splitlines()
    long = next(line for line in lines if "step:1" in line)
    assert (len(long), long[:18], long[-4:]) == (200, "  log:    step:1 -", "x...")
    assert "          short" in lines
    monkeypatch.setattr("launcher.commands.explain.terminal_width", lambda: 60)
    out, _ = explained(cluster, monkeypatch, capsys)
    assert max(len(line) for line in out.splitlines() if "step:1" in line) == 60
    out, _ = explained(cluster, monkeypatch, capsys, "--output", "json")
    assert "x" * 5500 in out


def test_a_pod_that_waits_for_a_node_has_not_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = submitted(fake_site())
    pod = facts("pod-a", started_at="2026-02-21T09:00:00Z", begun=False)
    server(site).objects[RUN][-1].history[:] = [pod]
    out, _ = explained(site, monkeypatch, capsys)
    assert "  when:   made 2026-02-21T09:00:00Z" in out
    assert "  ended:  it has not started yet" in out
    assert "attempt 1" not in out.splitlines()[1]
    server(site).becomes(RUN, Phase.EXECUTING)
    assert "attempt 1" in explained(site, monkeypatch, capsys)[0].splitlines()[1]


def test_attempts_of_one_second_are_told_in_the_order_of_their_numbers() -> None:
    told = [
        facts("c", number=3, started_at="2026-02-21T09:00:07.900Z"),
        facts("d", number=4, started_at="2026-02-21T09:00:07Z"),
        facts("lost", started_at="2026-02-21T09:00:05Z"),
        facts("a", number=1, started_at="2026-02-21T09:00:05.100+00:00"),
    ]
    assert [each.pod for each in merged(told, {})] == ["lost", "a", "c", "d"]


def test_times_of_events_have_one_form() -> None:
    lines = [
        event_line(Event(at=at, about="Job x", reason="R", message="m"))
        for at in ("2026-02-21T09:30:36Z", "2026-02-21T09:30:36.872287Z", "2026-02-21T10:30:36+01:00")
    ]
    assert set(lines) == {"2026-02-21T09:30:36Z  Job x: R: m"}
    assert moment("some day") == "some day"


def test_as_json_and_without_lines(
    cluster: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = explained(cluster, monkeypatch, capsys, "--output", "json", "--lines", "0")
    document = json.loads(out)
    assert document["status"]["state"] == "RUNNING"
    assert [attempt["verdict"] for attempt in document["attempts"]] == [
        "free_retry", "charged_retry", None,
    ]  # fmt: skip
    assert [attempt["log_lines"] for attempt in document["attempts"]] == [[], [], []]
    assert document["gaps"] == []
    assert "read_log" not in server(cluster).calls


def test_a_stop_that_only_events_tell_of_ends_when_the_trainer_says(cluster: Site) -> None:
    begun, over = "2026-02-21T12:00:00Z", "2026-02-21T12:00:40.000+00:00"
    path = RunPaths.of(cluster.root or Path(), RUN).attempt(2)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ended_at": over, "exit_code": 75}))
    stopped = facts("pod-c", started_at="2026-02-21T11:00:00Z", ended_at=begun, ended_by="suspended")
    server(cluster).objects[RUN][-1].history[-1] = stopped
    assert tell(cluster, RUN, num_lines=0).attempts[-1].facts.ended_at == over


def test_a_server_that_does_not_answer_leaves_gaps_and_the_rest_is_told(
    cluster: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server(cluster).reachable = False
    out, err = explained(cluster, monkeypatch, capsys)
    assert "attempt 1: pod pod-b on node gpu-3" in out
    assert "  ended:  failed (exit code 3): CUDA out of memory (charged)" in out
    for what in ("the backend's history", "the backend's events", "the logs"):
        assert f"not known: {what}: the server did not answer" in err


def test_a_torn_record_hides_nothing_else(cluster: Site) -> None:
    assert cluster.root is not None
    RunPaths.of(cluster.root, RUN).attempt(1).write_text("{")
    story = tell(cluster, RUN, num_lines=1)
    assert [attempt.facts.number for attempt in story.attempts] == [None, None, 2]


def test_only_the_end_of_a_long_log_is_read(cluster: Site) -> None:
    """Where its size can be seen; the pieces are counted."""
    assert cluster.root is not None
    log = RunPaths.of(cluster.root, RUN).log(1)
    log.write_bytes(b"x" * 99 + b"\n" + b"line\n" * 100_000)
    backend = server(cluster)
    backend.logs[(RUN, 1)] = log.read_bytes()
    offsets: list[int] = []
    read = backend.read_log

    def counted(run: str, attempt: int, offset_bytes: int) -> bytes:
        if attempt == 1:
            offsets.append(offset_bytes)
        return read(run, attempt, offset_bytes)

    backend.read_log = counted  # type: ignore[method-assign]
    story = tell(cluster, RUN, num_lines=3)
    assert story.attempts[1].log_lines == ("line",) * 3
    assert min(offsets) > 400_000


def test_a_local_run_tells_what_was_decided_and_why(local_run: LocalRun) -> None:
    local_run.order(["raw-exit 3"], ["say hello", "kill"], ["commit 1", "exit 75"], ["exit 78"])
    local_run.start().wait_settled()
    done = launcher("explain", local_run.name, "--output", "json", root=local_run.root)
    assert done.returncode == 0, done.stderr
    attempts = json.loads(done.stdout)["attempts"]
    assert [attempt["number"] for attempt in attempts] == [None, 1, 2, 3]
    assert [attempt["exit_code"] for attempt in attempts] == [3, -signal.SIGKILL, 75, 78]
    assert [attempt["verdict"] for attempt in attempts] == [
        "charged_retry", "charged_retry", "free_retry", "fatal",
    ]  # fmt: skip
    assert [attempt["decision"] for attempt in attempts] == [
        "started again after 0.01 s, charged: retry 1 of 2",
        "started again after 0.02 s, charged: retry 2 of 2",
        "started again after 0.01 s, not charged: retry without charge",
        "not started again, not charged: the same would happen again",
    ]
    assert attempts[1]["ended_by"] == "killed by SIGKILL (137), out of memory or killed from outside"
    assert attempts[2]["ended_by"] == "asked to be started again (75): ordered"
    assert attempts[1]["log_lines"] == ["attempt 1 begins", "say hello", "kill"]
    assert attempts[3]["resumed_from"] == 1
    assert all(attempt["ended_at"] for attempt in attempts)


def test_an_attempt_that_died_with_its_supervisor(local_run: LocalRun) -> None:
    local_run.order(["hang"], ["commit 1", "commit 2", "exit 0"]).start()
    local_run.wait_for_log("hang")
    local_run.supervisor().send(signal.SIGKILL)
    wait_for(lambda: not local_run.supervisor().alive())
    local_run.start().wait_settled()
    story = tell(local_run.site, local_run.name, num_lines=0)
    assert [attempt.facts.number for attempt in story.attempts] == [1, 2]
    assert "its supervisor was killed, and it with it" in str(story.attempts[0].facts.ended_by)
    assert story.attempts[1].facts.decision == "nothing left to do: all steps committed"


def test_events_of_a_local_run(local_run: LocalRun) -> None:
    local_run.order(["exit 3"], ["commit 1", "commit 2", "exit 0"]).start().wait_settled()
    done = launcher("events", local_run.name, "--output", "json", root=local_run.root)
    events = json.loads(done.stdout)
    assert [event["reason"] for event in events] == [
        "SupervisorStarted", "AttemptStarted", "AttemptEnded", "Decided",
        "AttemptStarted", "AttemptEnded", "Decided", "RunEnded",
    ]  # fmt: skip
    assert [event["about"] for event in events if event["warning"]] == ["attempt 1"]
    text = launcher("events", local_run.name, "--warnings", root=local_run.root).stdout
    assert len(text.splitlines()) == 1
    assert "AttemptEnded" in text
    assert "exit code 3" in text


def test_events_of_a_cluster_and_of_no_run(
    cluster: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Place, "open", lambda *_: cluster)
    assert run_launcher(["events", RUN]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "SuccessfulCreate" in first
    assert second.startswith("warning  ")
    assert run_launcher(["events", "infl-none-0221"]) == 102
    server(cluster).happened = []
    assert run_launcher(["events", RUN]) == 0
    assert "no events of" in capsys.readouterr().err


def test_a_run_without_attempts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    site = submitted(fake_site(backend=FakeBackend()))
    out, _ = explained(site, monkeypatch, capsys)
    assert "no attempt is known yet" in out
    assert "PENDING (waits for a node)" in out
