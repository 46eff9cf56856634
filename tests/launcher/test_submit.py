"""Submitting: adopt or refuse, one supervisor whoever is first, following, and what the command line says."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from influence.rundir import RunPaths, RunSpec, read_run
from launcher.backends import Refusal, journal
from launcher.backends.attempt import trainer_command
from launcher.backends.detach import supervisor_environment
from launcher.backends.journal import Wish
from launcher.backends.local import LocalBackend
from launcher.commands.options import Place
from launcher.errors import BackendError, ConflictError, UsageError
from launcher.group import run as run_launcher
from launcher.lifecycle import Action, carry_out, plan_submit, require_room
from launcher.profiles import Profile
from launcher.run_facts import submit_command
from launcher.site import Site
from launcher.states import State
from tests.launcher.fake_backend import fake_site
from tests.launcher.local_run import GENEROUS_S, REPOSITORY, LocalRun, launcher, submit_process, wait_for

TINY = ("--preset", "smoke", "--overlay", "tiny-cpu", "--name", "infl-smoke-test")


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# --- the plan, and carrying it out


def test_a_new_run_is_created_and_started(local_run: LocalRun) -> None:
    local_run.orders(["commit 1", "commit 2", "exit 0"])
    plan = plan_submit(local_run.site, local_run.run)
    assert plan.action is Action.CREATE
    assert not local_run.root.exists()  # planning changes nothing
    assert carry_out(local_run.site, plan)
    assert read_run(local_run.paths) == local_run.run
    assert local_run.wait_settled().state is State.SUCCEEDED


def test_a_run_under_way_is_adopted_and_nothing_started(local_run: LocalRun) -> None:
    local_run.order(["hang"]).start()
    local_run.wait_for_log("hang")
    plan = plan_submit(local_run.site, local_run.run)
    assert plan.action is Action.ADOPT
    assert "adopted, nothing started" in plan.sentence
    assert not carry_out(local_run.site, plan)
    assert len(local_run.pids("starts")) == 1


def test_a_complete_run_is_done(local_run: LocalRun) -> None:
    local_run.order(["commit 1", "commit 2", "exit 0"]).start().wait_settled()
    wait_for(lambda: not local_run.supervisor().alive())
    before = tree(local_run.paths.root_dir)
    plan = plan_submit(local_run.site, local_run.run)
    assert plan.action is Action.COMPLETE
    assert not carry_out(local_run.site, plan)
    assert tree(local_run.paths.root_dir) == before


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["exit 78", "kill"])
def test_a_failed_run_is_started_again(local_run: LocalRun, ending: str) -> None:
    local_run.order(["commit 1", ending], ["commit 2", "exit 0"], backoff_limit=0).start().wait_settled()
    plan = plan_submit(local_run.site, local_run.run)
    assert plan.action is Action.RESTART
    assert "started again" in plan.sentence
    assert carry_out(local_run.site, plan)
    assert local_run.wait_settled().state is State.SUCCEEDED


def test_another_spec_of_the_same_name_is_refused_with_the_difference(local_run: LocalRun) -> None:
    local_run.order(["exit 0"])
    before = tree(local_run.paths.root_dir)
    local_run.spec["training"] |= {"total_steps": 3}
    with pytest.raises(ConflictError) as caught:
        plan_submit(local_run.site, local_run.run)
    assert caught.value.why is not None
    assert "training.total_steps: 2 -> 3" in caught.value.why
    assert tree(local_run.paths.root_dir) == before


def test_a_spec_that_takes_the_name_after_the_plan_is_refused_too(local_run: LocalRun) -> None:
    local_run.orders(["exit 0"])
    plan = plan_submit(local_run.site, local_run.run)
    local_run.spec["training"] |= {"total_steps": 3}
    local_run.order(["exit 0"])  # another submit, in between
    with pytest.raises(ConflictError):
        carry_out(local_run.site, plan)
    assert not local_run.paths.supervisor_json.exists()


def test_somebody_elses_folder_is_left_alone(local_run: LocalRun) -> None:
    local_run.orders(["exit 0"])
    local_run.paths.root_dir.mkdir(parents=True)
    (local_run.paths.root_dir / "thesis.txt").write_text("words")
    with pytest.raises(UsageError, match=r"no run\.json, but thesis\.txt"):
        plan_submit(local_run.site, local_run.run)
    assert tree(local_run.paths.root_dir) == {"thesis.txt": b"words"}


def test_a_submit_that_died_before_it_wrote_the_spec_does_not_block(local_run: LocalRun) -> None:
    local_run.orders(["commit 1", "commit 2", "exit 0"])
    local_run.paths.local_dir.mkdir(parents=True)
    assert plan_submit(local_run.site, local_run.run).action is Action.CREATE


def test_a_submit_that_died_before_the_supervisor_is_taken_up(local_run: LocalRun) -> None:
    local_run.order(["commit 1", "commit 2", "exit 0"])
    assert local_run.status().state is State.PENDING
    plan = plan_submit(local_run.site, local_run.run)
    assert plan.action is Action.RESTART


def test_a_run_on_another_machine_is_not_taken_over(local_run: LocalRun) -> None:
    local_run.order(["exit 0"]).start().wait_settled()
    local_run.paths.events_jsonl.unlink()  # which tells of the end
    record = json.loads(local_run.paths.supervisor_json.read_text())
    record |= {"host": "elsewhere", "boot_id": "another", "phase": "running", "outcome": None}
    local_run.paths.supervisor_json.write_text(json.dumps(record))
    assert local_run.status().state is State.UNKNOWN
    assert "elsewhere" in local_run.status().reason
    with pytest.raises(BackendError, match="state is unknown"):
        plan_submit(local_run.site, local_run.run)
    with pytest.raises(BackendError, match="another machine"):
        local_run.backend.submit(local_run.run)


def test_a_reboot_is_told_from_another_machine(local_run: LocalRun) -> None:
    """The same host name under another boot id: whatever ran there is gone."""
    local_run.order(["exit 0"]).start().wait_settled()
    local_run.paths.events_jsonl.unlink()  # which tells of the end
    record = json.loads(local_run.paths.supervisor_json.read_text())
    record |= {"boot_id": "before", "phase": "running", "outcome": None, "pid": os.getpid()}
    record |= {"start_token": "before:1"}
    local_run.paths.supervisor_json.write_text(json.dumps(record))
    status = local_run.status()
    assert (status.state, "is gone" in status.reason) == (State.FAILED, True)


def test_a_foreign_supervisor_record_is_unknown_and_named(local_run: LocalRun) -> None:
    local_run.order(["exit 0"])
    local_run.paths.local_dir.mkdir()
    local_run.paths.supervisor_json.write_text('{"pid": "x"}')
    status = local_run.status()
    assert status.state is State.UNKNOWN
    assert "supervisor.json" in status.reason


@pytest.mark.slow
def test_a_cancelled_run_goes_on_when_submitted_again(local_run: LocalRun) -> None:
    local_run.order(["commit 1", "hang"], ["commit 2", "exit 0"]).start()
    local_run.wait_for_log("hang")
    local_run.backend.cancel(local_run.name)
    assert local_run.status().state is State.CANCELLED
    plan = plan_submit(local_run.site, local_run.run)
    assert plan.action is Action.RESTART
    assert "CANCELLED" in plan.sentence
    carry_out(local_run.site, plan)
    assert local_run.wait_settled().state is State.SUCCEEDED


# --- processes at once, terminals that go


@pytest.mark.slow
def test_many_submits_at_once_start_one_supervisor(local_run: LocalRun) -> None:
    local_run.orders(["hang"])
    submits = [submit_process(local_run, "--json") for _ in range(6)]
    answers = []
    for process in submits:
        out, err = process.communicate(timeout=GENEROUS_S)
        assert process.returncode == 0, err
        answers.append(json.loads(out))
    assert sum(answer["started"] for answer in answers) == 1
    local_run.wait_for_log("hang")
    assert len(local_run.pids("starts")) == 1
    assert len(local_run.events("supervisor_started")) == 1


@pytest.mark.slow
def test_follow_ends_with_the_run_and_its_exit_code(local_run: LocalRun) -> None:
    local_run.orders(["commit 1", "kill"], ["commit 2", "exit 0"])
    process = submit_process(local_run, "--follow")
    out, err = process.communicate(timeout=GENEROUS_S)
    assert process.returncode == 0, err
    assert "state:     SUCCEEDED" in out
    assert "steps 2/2, attempt 2" in out
    assert "is new" in err


@pytest.mark.slow
def test_follow_of_a_failing_run_exits_100_and_says_why(local_run: LocalRun) -> None:
    local_run.orders(["exit 78"])
    process = submit_process(local_run, "--follow")
    out, _ = process.communicate(timeout=GENEROUS_S)
    assert process.returncode == 100
    assert "configuration error (78)" in out


@pytest.mark.slow
def test_follow_of_a_run_that_is_cancelled_exits_103(local_run: LocalRun) -> None:
    local_run.orders(["hang"])
    process = submit_process(local_run, "--follow", "--json")
    local_run.wait_for_log("hang")
    local_run.backend.cancel(local_run.name)
    out, _ = process.communicate(timeout=GENEROUS_S)
    assert process.returncode == 103
    assert json.loads(out)["state"] == "CANCELLED"


@pytest.mark.slow
def test_ctrl_c_of_follow_leaves_the_run_running_and_says_so(local_run: LocalRun) -> None:
    local_run.orders(["commit 1", "hang"])
    process = submit_process(local_run, "--follow")
    local_run.wait_for_log("hang")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=GENEROUS_S)
    assert process.returncode == 130
    assert f"run {local_run.name} goes on" in err
    assert f"launcher cancel {local_run.name}" in err
    assert "Traceback" not in err
    assert local_run.status().state is State.RUNNING


@pytest.mark.slow
def test_ctrl_c_from_a_terminal_reaches_the_launcher_only(local_run: LocalRun) -> None:
    """A terminal signals its whole foreground process group."""
    local_run.orders(["commit 1", "hang"], ["commit 2", "exit 0"])
    process = submit_process(local_run, "--follow", start_new_session=True)
    local_run.wait_for_log("hang")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=GENEROUS_S)
    assert local_run.status().state is State.RUNNING


@pytest.mark.slow
def test_the_run_outlives_a_killed_launcher_and_its_working_directory(
    local_run: LocalRun, tmp_path: Path
) -> None:
    local_run.orders(["commit 1", "hang"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    process = submit_process(local_run, "--follow", start_new_session=True, cwd=elsewhere)
    local_run.wait_for_log("hang")
    os.killpg(process.pid, signal.SIGHUP)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=GENEROUS_S)
    elsewhere.rmdir()
    assert local_run.status().state is State.RUNNING
    assert local_run.supervisor().alive()
    facts = local_run.backend.cancel(local_run.name)
    assert facts.phase == "cancelled"


# --- what a machine lacks


class Small(LocalBackend):
    def refusal(self, run: RunSpec) -> Refusal | None:
        lacking = ["8 GPUs (this machine has none)", "9 CPUs (of 4)", "a lift"]
        return Refusal(lacking, run.spec["hardware"]["device"])


def small(run: LocalRun) -> Site:
    return replace(run.place, backend=Small(run.place.profile))


def test_refusal_names_the_overlay_and_the_backend_that_would_work(local_run: LocalRun) -> None:
    site = small(local_run)
    local_run.spec["hardware"] |= {"device": "cuda"}
    local_run.spec["overlays"] = []
    with pytest.raises(BackendError) as caught:
        require_room(site, local_run.run, ["--preset", "smoke", "--set", "a.b=c d"])
    assert caught.value.why == "it needs 8 GPUs (this machine has none), 9 CPUs (of 4) and a lift"
    assert caught.value.next_step is not None
    assert "launcher submit --preset smoke --set 'a.b=c d' --overlay tiny-cpu" in caught.value.next_step
    assert "describe a cluster in launcher.yaml" in caught.value.next_step


CLUSTERS = "clusters: {lab: {backend: kubernetes}, dgx: {backend: runai}, ray: {backend: kuberay}}\n"


def test_refusal_names_the_clusters_that_are_described(
    local_run: LocalRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "launcher.yaml").write_text(CLUSTERS)

    def next_step(**hardware: object) -> str:
        local_run.spec["hardware"] |= {"device": "cuda"} | hardware
        local_run.spec["overlays"] = []
        with pytest.raises(BackendError) as caught:
            require_room(small(local_run), local_run.run, ["--preset", "smoke"])
        return str(caught.value.next_step)

    assert "`launcher submit --preset smoke --cluster lab` (or dgx, ray)" in next_step()
    # An overlay for one CPU does not make one node of two.
    assert next_step(nodes=2) == "choose a cluster of that backend: --cluster ray"


@pytest.mark.parametrize("verb", ["submit", "render"])
def test_several_nodes_name_the_clusters_that_have_them_and_ask_no_server(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    for described, words in (
        (CLUSTERS.replace("}}\n", "}, lab2: {backend: kuberay}}\n"), "--cluster ray or --cluster lab2"),
        (CLUSTERS.replace(", ray: {backend: kuberay}", ""), "with backend: kuberay in launcher.yaml"),
    ):
        described = described.replace("dgx: {backend: runai}", f"dgx: {{backend: runai, runai: {RUNAI}}}")
        (tmp_path / "launcher.yaml").write_text(described)
        monkeypatch.setenv("INFL_CONFIG", str(tmp_path / "launcher.yaml"))  # not the project's
        for cluster in ("lab", "dgx"):
            assert run_launcher([verb, "--preset", "alltoken-2node", "--cluster", cluster]) == 3
            told = capsys.readouterr().err
            assert f"hardware.nodes is 2, and cluster '{cluster}' is of the backend" in told
            assert words in told


RUNAI = "{url: 'https://lab.run.ai', project: team}"


def test_a_dry_run_suggests_the_render_of_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Place, "open", lambda *_: fake_site())
    words = ["--preset", "smoke", "--overlay", "tiny-cpu", "--name", "infl-mine-0221", "--allow-dirty"]
    (tmp_path / "launcher.yaml").write_text("clusters: {lab: {backend: kubernetes}}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launcher.commands.submit.require_published", lambda run, **_: run)
    assert run_launcher(["submit", *words, "--cluster", "lab", "--dry-run"]) == 0
    suggested = next(
        line.partition(": launcher ")[2]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("see the spec")
    )
    assert suggested == f"render {' '.join(words)} --cluster lab"
    asked: list[bool] = []

    def published(run: RunSpec, *, allow_dirty: bool) -> RunSpec:
        asked.append(allow_dirty)
        return run

    monkeypatch.setattr("launcher.commands.render.require_published", published)
    assert run_launcher(suggested.split()) == 0
    assert 'name: "infl-mine-0221"' in capsys.readouterr().out
    assert asked == [True]


def test_a_run_that_is_not_here_may_be_on_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["status", "infl-x-0221"], ["collect", "--run", "infl-x-0221"]):
        assert run_launcher(command) == 102
        assert "--cluster" not in capsys.readouterr().err
    (tmp_path / "launcher.yaml").write_text(CLUSTERS)
    for command in (["status", "infl-x-0221"], ["collect", "--run", "infl-x-0221"]):
        assert run_launcher(command) == 102
        assert "launcher.yaml describes more: --cluster lab | dgx | ray" in capsys.readouterr().err


def test_refusal_does_not_suggest_the_overlay_that_is_there(local_run: LocalRun) -> None:
    with pytest.raises(BackendError) as caught:
        require_room(
            small(local_run),
            local_run.run,
            ["--preset", "smoke", "--overlay", "tiny-cpu"],
        )
    assert caught.value.next_step is not None
    assert "launcher submit" not in caught.value.next_step


def test_a_machine_without_the_trainer_s_packages_is_refused(
    local_run: LocalRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = local_run.place.backend
    assert trainer.refusal(local_run.run) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "verl" else object())
    refusal = trainer.refusal(local_run.run)
    assert refusal is not None
    assert refusal.lacking == ["the packages verl; install them: pip install 'influence-launcher[trainer]'"]
    # Another program than the trainer brings its own.
    assert LocalBackend(local_run.place.profile, ["true"]).refusal(local_run.run) is None


# --- the command line


def test_a_gpu_preset_is_refused_before_anything_starts(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    done = launcher("submit", "--preset", "alltoken-timing", "--set", "hardware.cpus=100000", root=root)
    assert done.returncode == 5
    assert "100000 CPUs" in done.stderr
    assert "--overlay tiny-cpu" in done.stderr
    assert "choose it with --cluster" in done.stderr
    assert not root.exists()
    as_json = launcher(
        "submit",
        "--preset",
        "alltoken-timing",
        "--set",
        "hardware.cpus=100000",
        "--output",
        "json",
        root=root,
    )
    assert json.loads(as_json.stdout)["exit_code"] == 5


def test_dry_run_tells_and_changes_nothing(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    done = launcher("submit", *TINY, "--set", "hardware.cpus=1", "--dry-run", root=root)
    assert done.returncode == 0, done.stderr
    assert "infl-smoke-test" in done.stdout
    assert "nothing was changed" in done.stdout
    document = json.loads(
        launcher(
            "submit", *TINY, "--set", "hardware.cpus=1", "--dry-run", "--output", "json", root=root
        ).stdout
    )
    assert (document["run"], document["action"]) == ("infl-smoke-test", "create")
    assert document["spec"]["overlays"] == ["tiny-cpu"]
    assert not root.exists()


def test_conflict_exits_4(tmp_path: Path) -> None:
    run = RunSpec.new("infl-smoke-test", {"preset": "smoke"})
    paths = RunPaths.of(tmp_path, run.run)
    paths.root_dir.mkdir()
    paths.run_json.write_text(json.dumps(run.to_dict()))
    done = launcher("submit", *TINY, "--set", "hardware.cpus=1", root=tmp_path)
    assert done.returncode == 4
    assert "training.total_steps: (absent) -> 1" in done.stderr


def test_another_schema_version_exits_3_in_one_error(tmp_path: Path) -> None:
    run = RunSpec.new("infl-smoke-test", {"preset": "smoke"})
    paths = RunPaths.of(tmp_path, run.run)
    paths.root_dir.mkdir()
    paths.run_json.write_text(json.dumps(run.to_dict() | {"schema_version": 99}))
    done = launcher("submit", *TINY, "--set", "hardware.cpus=1", root=tmp_path)
    assert done.returncode == 3
    assert "99" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_that_takes_no_byte_is_one_clear_error(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the first write fails, at the same place."""
    done = launcher(
        "submit", *TINY, "--set", "hardware.cpus=1", root=tmp_path / "runs",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )  # fmt: skip
    assert done.returncode == 5
    assert "run.json: writing failed" in done.stderr
    assert "  next: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").rglob("*.*"))


def test_an_unknown_backend_is_a_usage_error(tmp_path: Path) -> None:
    done = launcher("submit", *TINY, "--backend", "clouds", root=tmp_path)
    assert done.returncode == 2


def test_real_runs_execute_the_trainer() -> None:
    command = trainer_command("/usr/bin/python3", Path("/runs/infl-x-0221"))
    assert command == ["/usr/bin/python3", "-m", "influence.train", "--run-dir", "/runs/infl-x-0221"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            ["launcher", "submit", "--preset", "smoke", "--follow", "--suffix", "x", "--root", "my runs"],
            "launcher submit --preset smoke --name infl-fake-0221",
        ),
        (
            ["launcher", "submit", "--preset=smoke", "--name=a", "-o", "json", "--dry-run"],
            "launcher submit --preset=smoke --name infl-fake-0221",
        ),
        (
            ["launcher", "--debug", "submit", "--preset", "a.yaml", "--set", "a=1", "-ojson", "--root=x"],
            "launcher submit --preset a.yaml --set a=1 --name infl-fake-0221",
        ),
        ([], "launcher submit --preset smoke --overlay tiny-cpu --name infl-fake-0221"),
        (["python", "demo.py"], "launcher submit --preset smoke --overlay tiny-cpu --name infl-fake-0221"),
    ],
)
def test_the_command_to_go_on_with_names_the_run(
    local_run: LocalRun, command: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunSpec.new(local_run.name, local_run.spec, provenance={"command": command})
    here = Profile(name="local", backend="local")
    assert submit_command(run, Site.open(here, Path("my runs")).options) == f"{expected} --root 'my runs'"
    monkeypatch.setenv("INFL_ROOT", str(Path("my runs").absolute()))
    assert submit_command(run, Site.open(here, Path("my runs")).options) == expected


def test_relative_python_paths_become_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f".{os.pathsep}{os.pathsep}lib")
    monkeypatch.setenv("INFL_RUN_DIR", "/r/other")
    monkeypatch.setenv("INFL_RUN_JSON", "{}")
    environment = supervisor_environment()
    entries = environment["PYTHONPATH"].split(os.pathsep)
    assert entries[:2] == [str(Path.cwd()), str(Path.cwd() / "lib")]
    assert str(REPOSITORY) in entries
    assert not {"INFL_RUN_DIR", "INFL_RUN_JSON"} & environment.keys()


def test_a_source_tree_that_is_only_the_working_directory_is_found_again(tmp_path: Path) -> None:
    """``cd checkout; python -m launcher ...`` without an installation; the supervisor starts elsewhere."""
    code = "from launcher.backends.detach import supervisor_environment as e; print(e()['PYTHONPATH'])"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(REPOSITORY) in done.stdout.strip().split(os.pathsep)


@pytest.mark.slow
def test_follow_on_a_terminal_shows_a_bar_and_obeys_nothing_in_the_log(local_run: LocalRun) -> None:
    local_run.orders(["commit 1", "hang [red]markup[/red] \u001b[2J"], ["commit 2", "exit 0"])
    controller, terminal = pty.openpty()
    process = submit_process(local_run, "--follow", stderr=terminal)
    os.close(terminal)
    local_run.wait_for_log("hang")
    seen = [b""]

    def watch() -> None:
        with suppress(OSError):  # how Linux reports that the other end was closed
            while chunk := os.read(controller, 65536):
                seen[0] += chunk

    reader = threading.Thread(target=watch, daemon=True)
    reader.start()
    wait_for(lambda: b"markup" in seen[0])
    os.kill(local_run.pids("starts")[0], signal.SIGTERM)
    out, _ = process.communicate(timeout=GENEROUS_S)
    reader.join(GENEROUS_S)
    os.close(controller)
    assert process.returncode == 0
    assert "state:     SUCCEEDED" in out
    text = seen[0].decode()
    assert "1/2" in text
    assert "attempt 1" in text
    assert "hang [red]markup[/red] \\x1b[2J" in text
    assert "\x1b[2J" not in text


def test_a_run_that_is_being_stopped_is_not_adopted(local_run: LocalRun) -> None:
    local_run.order(["deaf"], grace_period_s=GENEROUS_S).start()
    local_run.wait_for_log("deaf")
    journal.request(local_run.paths, Wish.CANCEL)
    with pytest.raises(ConflictError, match="is being stopped") as refused:
        plan_submit(local_run.site, local_run.run)
    assert refused.value.next_step is not None
    assert f"launcher status {local_run.name} --wait" in refused.value.next_step
