"""``launcher status``: one run, all runs, waiting, watching, broken directories, and what it imports."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from influence.rundir import RunPaths, RunSpec, create_run
from launcher.backends import journal
from launcher.commands.status import detail_lines, table_lines
from launcher.errors import ExitCode
from launcher.group import run as run_launcher
from launcher.output import table, terminal_width
from launcher.progress import age, progress_parts, wandb_line
from launcher.states import RunStatus, State
from tests.launcher.local_run import GENEROUS_S, REPOSITORY, SPEC, LocalRun, launcher, wait_for

HEAVY = (
    "pydantic",
    "jinja2",
    "numpy",
    "rich",
    "kubernetes",
    "yaml",
    "torch",
    "verl",
    "wandb",
    "subprocess",
    "argparse",
)


def status(run: LocalRun, *options: str) -> tuple[int, dict[str, object]]:
    done = launcher("status", run.name, "--output", "json", *options, root=run.root)
    return done.returncode, json.loads(done.stdout)


def test_one_run_in_detail(local_run: LocalRun) -> None:
    local_run.order(["commit 1", "hang"]).start()
    local_run.wait_for_log("hang")
    done = launcher("status", local_run.name, root=local_run.root)
    assert done.returncode == 0
    lines = {line.partition(":")[0]: line.partition(":")[2].strip() for line in done.stdout.splitlines()}
    assert lines["state"] == "RUNNING"
    assert lines["progress"].startswith("steps 1/2, attempt 1, last step ")
    assert lines["preset"] == "smoke + tiny-cpu"
    assert lines["W&B"] == f"offline run {local_run.name}"
    assert lines["directory"] == str(local_run.paths.root_dir)
    code, document = status(local_run)
    assert code == 0
    assert (document["state"], document["steps_committed"], document["total_steps"]) == ("RUNNING", 1, 2)
    assert isinstance(document["last_step_age_s"], float)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("orders", "code"),
    [(["commit 1", "commit 2", "exit 0"], 0), (["exit 78"], 100)],
)
def test_wait_exits_by_the_outcome(local_run: LocalRun, orders: list[str], code: int) -> None:
    local_run.order(orders).start()
    assert status(local_run, "--wait")[0] == code
    assert status(local_run)[0] == 0  # without --wait the state is no error


@pytest.mark.slow
def test_wait_exits_103_when_cancelled_and_101_when_time_is_up(local_run: LocalRun) -> None:
    local_run.order(["hang"]).start()
    code, document = status(local_run, "--wait", "--timeout", "0.2")
    assert (code, document["settled"]) == (101, False)
    local_run.backend.cancel(local_run.name)
    assert status(local_run, "--wait")[0] == 103


def test_not_found_is_102_and_a_bad_name_is_2(local_run: LocalRun) -> None:
    assert launcher("status", "infl-none-0221", "--wait", root=local_run.root).returncode == 102
    assert launcher("status", "../../etc", root=local_run.root).returncode == 2
    assert launcher("status", "--wait", root=local_run.root).returncode == 2
    assert launcher("status", local_run.name, "--timeout", "1", root=local_run.root).returncode == 2


@pytest.mark.slow
def test_watch_tells_each_change_and_ends_with_the_run(local_run: LocalRun) -> None:
    local_run.order(["commit 1", "kill"], ["commit 2", "exit 0"], backoff_s=1).start()
    done = launcher("status", local_run.name, "--watch", root=local_run.root)
    assert done.returncode == 0
    assert "RETRYING" in done.stderr
    assert "state:     SUCCEEDED" in done.stdout


def test_every_run_in_the_root_with_the_broken_ones(local_run: LocalRun) -> None:
    """A foreign, a torn, a linked, ... directory is UNKNOWN with its reason, and hides no other."""
    local_run.order(["commit 1", "commit 2", "exit 0"]).start().wait_settled()
    root = local_run.root
    (root / "infl-foreign-0221").mkdir()
    (root / "infl-torn-0221").mkdir()
    (root / "infl-torn-0221" / "run.json").write_text('{"run": "infl-to')
    (root / "infl-link-0221").symlink_to(local_run.paths.root_dir)
    (root / "Not A Name").mkdir()
    (root / ".hidden").mkdir()
    (root / "a-file").write_text("")
    other = RunSpec.new("infl-version-0221", SPEC)
    (root / other.run).mkdir()
    (root / other.run / "run.json").write_text(json.dumps(other.to_dict() | {"schema_version": 99}))
    poor = RunSpec.new("infl-poor-0221", {"preset": "x"})
    create_run(RunPaths.of(root, poor.run), poor)
    done = launcher("status", "--output", "json", root=root)
    assert done.returncode == 0, done.stderr
    found = {entry["run"]: (entry["state"], entry["reason"]) for entry in json.loads(done.stdout)}
    assert found.pop(local_run.name)[0] == "SUCCEEDED"
    reasons = {
        "Not A Name": "cannot be the name",
        "infl-foreign-0221": "no run.json",
        "infl-link-0221": "symbolic link",
        "infl-poor-0221": "lacks",
        "infl-torn-0221": "not valid JSON",
        "infl-version-0221": "schema version 99",
    }
    assert {name: state for name, (state, _) in found.items()} == dict.fromkeys(reasons, "UNKNOWN")
    for name, words in reasons.items():
        assert words in found[name][1], name
    table = launcher("status", root=root)
    assert len(table.stdout.splitlines()) == 2 + 7


def test_names_from_disk_cannot_move_the_cursor(local_run: LocalRun) -> None:
    local_run.root.mkdir()
    (local_run.root / "x\x1b[2Jy").mkdir()
    assert "\x1b" not in launcher("status", root=local_run.root).stdout


def test_a_damaged_record_is_named_and_its_step_not_counted(local_run: LocalRun) -> None:
    local_run.order(["commit 1", "hang"]).start()
    local_run.wait_for_log("hang")
    local_run.paths.step_record(1).write_text('{"step"')
    _, document = status(local_run)
    assert (document["state"], document["steps_committed"]) == ("RUNNING", 0)
    assert "step_000001.json" in str(document["reason"])


def test_an_empty_root_and_one_that_is_not_there(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "none"):
        done = launcher("status", root=root)
        assert (done.returncode, done.stdout) == (0, "")
        assert "no runs in" in done.stderr
        assert json.loads(launcher("status", "--output", "json", root=root).stdout) == []


def test_a_lost_supervisor_is_failed_and_says_how_to_go_on(local_run: LocalRun) -> None:
    local_run.order(["hang"]).start()
    local_run.wait_for_log("hang")
    local_run.supervisor().send(signal.SIGKILL)
    wait_for(lambda: not local_run.supervisor().alive())
    code, document = status(local_run, "--wait")
    assert (code, document["state"]) == (100, "FAILED")
    assert "is gone" in str(document["reason"])
    assert (
        document["next_command"]
        == f"launcher submit --preset smoke --overlay tiny-cpu --name {local_run.name}"
    )


def test_status_imports_nothing_heavy(local_run: LocalRun) -> None:
    """Its time is spent importing; counting imports is steadier than a clock."""
    local_run.order(["commit 1", "commit 2", "exit 0"]).start().wait_settled()
    code = (
        "import sys; from launcher.cli import main\n"
        "try: main(sys.argv[1:])\n"
        f"finally: print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    for arguments in (["status", local_run.name], ["status"], ["status", local_run.name, "--wait"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--root", str(local_run.root)],
            cwd=REPOSITORY, env=dict(os.environ), timeout=GENEROUS_S, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr.strip() == "HEAVY []"


# --- words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (3600, "60 min"), (7200, "2.0 h"), (2e5, "2 d")],
)
def test_ages(seconds: float, words: str) -> None:
    assert age(seconds) == words


def some_status(**fields: object) -> RunStatus:
    given = {
        "run": "infl-x-0221", "backend": "local", "state": State.RUNNING, "reason": "r", "next_command": None,
        "settled": False, "run_dir": "/r",
    }  # fmt: skip
    return RunStatus(**(given | fields))  # type: ignore[arg-type]


def test_progress_in_words() -> None:
    assert progress_parts(some_status()) == ["no progress known"]
    full = some_status(
        steps_committed=143,
        total_steps=221,
        attempt=3,
        last_step_age_s=250.0,
        charged_retries=2,
        backoff_limit=4,
    )
    assert progress_parts(full) == ["steps 143/221", "attempt 3", "retry 2 of 4", "last step 4 min ago"]


def test_wandb_in_words() -> None:
    link = "https://wandb.ai/e/p/runs/infl-x-0221"
    assert wandb_line(some_status(wandb_mode="disabled")) is None
    assert wandb_line(some_status()) is None
    assert wandb_line(some_status(wandb_mode="online", wandb_url=link)) == f"{link} (unverified)"
    assert wandb_line(some_status(wandb_mode="online")) == "online run infl-x-0221"
    assert wandb_line(some_status(wandb_mode="offline")) == "offline run infl-x-0221"
    assert link in str(wandb_line(some_status(wandb_mode="offline", wandb_url=link)))


def _ended_without_a_record(run: LocalRun, *, ended_at: str) -> None:
    """A supervisor that is gone, whose last record says that the trainer runs; its end is history only."""
    run.order()
    record = journal.SupervisorRecord(
        pid=2**22 + 1, start_token="0", boot_id="of an earlier start", host=os.uname().nodename,  # noqa: S106
        started_at="2026-02-21T09:00:00.000+00:00", phase=journal.SupervisorPhase.RUNNING,
        reason="the trainer runs",
    )  # fmt: skip
    run.paths.local_dir.mkdir(exist_ok=True)
    journal.write_supervisor(run.paths, record)
    event = {"event": "run_ended", "at": ended_at, "outcome": "failed", "reason": "no space left on device"}
    run.paths.events_jsonl.write_text(json.dumps(event) + "\n")


def test_a_supervisor_that_could_not_replace_its_record_is_believed_its_last_event(
    local_run: LocalRun,
) -> None:
    _ended_without_a_record(local_run, ended_at="2026-02-21T10:00:00.000+00:00")
    status = local_run.status()
    assert (status.state, status.reason) == (State.FAILED, "no space left on device")
    assert status.next_command is not None
    assert status.next_command.startswith(f"launcher logs {local_run.name}")


@pytest.mark.parametrize("ended_at", ["2026-02-21T08:00:00.000+00:00", "yesterday"])
def test_the_end_of_an_earlier_supervisor_says_nothing_about_a_later_one(
    local_run: LocalRun, ended_at: str
) -> None:
    _ended_without_a_record(local_run, ended_at=ended_at)
    assert "is gone" in local_run.status().reason


def test_a_corrupt_supervisor_record_comes_with_a_cure_that_works(
    local_run: LocalRun, capsys: pytest.CaptureFixture[str]
) -> None:
    local_run.order()
    local_run.paths.local_dir.mkdir(exist_ok=True)
    local_run.paths.supervisor_json.write_text("{")
    words = ["cancel", local_run.name, "--root", str(local_run.root)]
    assert run_launcher(words) == ExitCode.INCOMPLETE
    told = capsys.readouterr().err
    assert str(local_run.paths.supervisor_json) in told
    assert "remove this file" in told
    local_run.paths.supervisor_json.unlink()
    assert run_launcher(words) == ExitCode.OK


def test_no_field_poses_as_further_lines(local_run: LocalRun, capsys: pytest.CaptureFixture[str]) -> None:
    _ended_without_a_record(local_run, ended_at="2026-02-21T10:00:00.000+00:00")
    events = local_run.paths.events_jsonl
    event = json.loads(events.read_text()) | {"reason": "x\nstate:     SUCCEEDED\u202e\u2066\u200f"}
    events.write_text(json.dumps(event) + "\n")
    for words in (["status", local_run.name], ["status"], ["status", local_run.name, "--watch"]):
        run_launcher([*words, "--root", str(local_run.root)])
        told = "".join(capsys.readouterr())
        assert "x\\nstate:     SUCCEEDED\\u202e\\u2066\\u200f" in told
        assert not any(line.startswith("state:     SUCCEEDED") for line in told.split("\n"))
        assert not set(told) & set("\u202e\u2066\u200f")


# --- tables and terminals


@pytest.mark.parametrize("width", [200, 110, 80, 40])
def test_a_table_fits_its_terminal(width: int) -> None:
    """Beside the others where there is room for words, else below its row; and never hidden."""
    reason = "no node takes its pod: " + "0/3 nodes are available, " * 20
    statuses = [some_status(reason=reason), some_status(run="infl-a-much-longer-name-0221", reason="short")]
    whole = table_lines(statuses)
    lines = table_lines(statuses, width=width)
    assert max(map(len, whole)) > 200
    others = table_lines([replace(status, reason="") for status in statuses])
    assert max(len(line) for line in lines) <= max(width, *map(len, others))
    assert sum("no node takes" in line for line in lines) == sum("short" in line for line in lines) == 1
    assert any(line.endswith("...") for line in lines)
    assert len(lines) == (4 if width >= 110 else 6)


def test_a_table_that_fits_is_left_as_it_is() -> None:
    rows = [["a", "short"], ["b", ""]]
    assert table(["X", "REASON"], rows, width=20) == table(["X", "REASON"], rows)


def test_the_width_is_a_terminal_s_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "77")
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}", Stream(terminal=False))
    assert terminal_width() is None
    monkeypatch.setattr("sys.stdout", Stream(terminal=True))
    assert (terminal_width(), terminal_width(err=True)) == (77, None)


class Stream(io.StringIO):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_when_a_run_was_submitted_is_no_start() -> None:
    lines = detail_lines(some_status(submitted_at="2026-02-21T09:30:00.123Z", state=State.PENDING))
    assert "submitted: 2026-02-21T09:30:00Z" in lines
    assert not any(line.startswith("started") for line in lines)
