"""The command line: what it imports, its help, its errors and exit codes, its two kinds of output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from launcher.cli import COMMANDS, OVERVIEW
from launcher.errors import ExitCode, LauncherError, exit_codes_line
from launcher.group import cli, run
from launcher.presets import PresetLibrary
from launcher.yaml_source import parse_yaml

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "verl",
    "ray",
    "wandb",
    "kubernetes",
    "pydantic",
    "jinja2",
    "numpy",
    "yaml",
    "rich",
    "sqlite3",
)


def launch(
    *args: str, code: str = "from launcher.cli import main; main()", **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
        **kwargs,
    )


def imported_by(*args: str) -> set[str]:
    """The top-level modules of a process that ran the command line with these arguments."""
    code = (
        "import sys\n"
        "try:\n    from launcher.cli import main; main()\n"
        "finally:\n    print(*sys.modules, file=sys.stderr)"
    )
    return {name.partition(".")[0] for name in launch(*args, code=code).stderr.split()}


# --- what is imported


@pytest.mark.parametrize("args", [("--help",), ("-h",), ("--version",), ()])
def test_the_overview_imports_no_library_at_all(args: tuple[str, ...]) -> None:
    modules = imported_by(*args)
    assert "launcher" in modules
    assert not modules & {*HEAVY, "click", "influence"}


@pytest.mark.parametrize(
    "args", [("render", "--help"), ("presets", "--help"), ("presets", "show", "--help"), ("rendr",)]
)
def test_help_and_typing_errors_import_click_alone(args: tuple[str, ...]) -> None:
    modules = imported_by(*args)
    assert "click" in modules
    assert not modules & set(HEAVY)


def test_presets_and_render_import_no_training_library() -> None:
    modules = imported_by("render", "--preset", "smoke")
    assert {"pydantic", "jinja2", "yaml"} <= modules
    assert not modules & {"torch", "verl", "ray", "wandb", "kubernetes", "numpy"}


# --- help


def all_commands() -> dict[str, click.Command]:
    """Every command and subcommand by its words."""
    found: dict[str, click.Command] = {}
    for name, (module, _) in COMMANDS.items():
        if find_spec(module) is None:
            continue
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        found[name] = command
        for sub, below in getattr(command, "commands", {}).items():
            found[f"{name} {sub}"] = below
    return found


@pytest.mark.parametrize("words", all_commands())
def test_every_command_explains_itself_its_options_and_its_exit_codes(words: str) -> None:
    command = all_commands()[words]
    assert command.help and len(command.help) > 20
    assert command.epilog and command.epilog.startswith("Exit codes: 0 done")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{words} {parameter.opts}"
    done = launch(*words.split(), "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"Usage: launcher {words}") or "Usage:" in done.stdout


@pytest.mark.parametrize(
    "words", [words for words, command in all_commands().items() if not isinstance(command, click.Group)]
)
def test_every_command_speaks_json(words: str) -> None:
    options = [option for parameter in all_commands()[words].params for option in parameter.opts]
    assert "--output" in options


AT_A_PLACE = (
    "submit",
    "status",
    "logs",
    "explain",
    "events",
    "cancel",
    "suspend",
    "resume",
    "collect",
    "doctor",
)


@pytest.mark.parametrize("words", [*AT_A_PLACE, "render"])
def test_every_command_about_runs_says_where_in_the_same_way(words: str) -> None:
    options = {
        option: parameter.help
        for parameter in all_commands()[words].params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    }
    common = {"--cluster", "--config", "--root"} if words in AT_A_PLACE else {"--cluster", "--config"}
    assert common <= options.keys()
    assert {options[name] for name in common} <= {
        parameter.help for parameter in all_commands()["status"].params if isinstance(parameter, click.Option)
    }


def test_the_overview_lists_every_command_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--help").stdout == OVERVIEW
    assert launch().stdout == OVERVIEW
    for name, (_, line) in COMMANDS.items():
        assert OVERVIEW.count(f"\n  {name} ") == 1
        assert line in OVERVIEW
    assert run(["--help"]) == 0, "click's own way to the same text"
    assert capsys.readouterr().out == OVERVIEW
    assert sorted(cli.list_commands(click.Context(cli))) == sorted(COMMANDS)


# --- errors


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    code = run(list(args))
    captured = capsys.readouterr()
    assert captured.out == "", "errors go to standard error"
    assert "Traceback" not in captured.err
    return code, captured.err


@pytest.mark.parametrize(
    ("args", "code", "what"),
    [
        (("rendr",), 2, "error: no command 'rendr'; did you mean render?"),
        (("xyzzy",), 2, "error: no command 'xyzzy'\n  next: launcher --help"),
        (("presets", "lst"), 2, "'lst'"),
        (("render",), 2, "Missing option '--preset'"),
        (("render", "--preset"), 2, "next: launcher render --help"),
        (("render", "--preset", "smoke", "--backend", "slurm"), 2, "slurm"),
        (("render", "--preset", "smok"), 2, "error: no preset 'smok'; did you mean smoke?"),
        (("render", "--preset", "smoke", "--overlay", "tiny"), 2, "did you mean tiny-cpu or tiny-gpu?"),
        (("render", "--preset", "smoke", "--name", "../x"), 2, "cannot be the name of a run"),
        (("render", "--preset", "smoke", "--set", "training.sed=1"), 3, "did you mean seed?"),
        (
            ("presets", "show", "smoke", "--set", "training.seed=x"),
            3,
            "--set training.seed: must be a whole number",
        ),
        (("presets", "list", "--jobs", "/nonexistent"), 2, "no such folder of presets: /nonexistent"),
    ],
)
def test_errors_have_their_exit_code_and_a_next_step(
    args: tuple[str, ...], code: int, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    actual, text = fails(capsys, *args)
    assert actual == code
    assert what in text
    assert "\n  next: " in text


@pytest.mark.parametrize("flags", [("--output", "json"), ("-o", "json"), ("--output=json",), ("-ojson",)])
@pytest.mark.parametrize(
    ("args", "code", "kind"),
    [
        (("render", "--preset", "none"), 2, "UsageError"),
        (("render",), 2, "UsageError"),
        (("render", "--preset", "smoke", "--set", "a=1"), 3, "SpecError"),
        (("nothing",), 2, "UsageError"),
    ],
)
def test_errors_are_json_where_json_was_asked_for(
    args: tuple[str, ...], code: int, kind: str, flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*args, *flags]) == code
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"error", "exit_code", "what", "why", "next_step"}
    assert (document["error"], document["exit_code"]) == (kind, code)
    assert document["next_step"]


def test_control_characters_of_a_name_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    _, text = fails(capsys, "presets", "show", "a\x1b[2Jb\x9b")
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "a\\x1b[2Jb" in text


def test_a_bug_is_told_as_one_and_shown_only_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(PresetLibrary, "presets", broken)
    code, text = fails(capsys, "presets", "list")
    assert code == ExitCode.INTERNAL
    assert "unexpected ZeroDivisionError: division by zero" in text
    assert "launcher --debug" in text
    assert run(["--debug", "presets", "list"]) == ExitCode.INTERNAL
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_reported_as_shells_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PresetLibrary, "presets", interrupted)
    assert run(["presets", "list"]) == ExitCode.INTERRUPTED


def test_a_reader_that_goes_away_is_no_failure() -> None:
    script = (
        f"{sys.executable} -m launcher render --preset smoke --backend local | true; echo ${{PIPESTATUS[0]}}"
    )
    for _ in range(3):
        done = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=True
        )
        assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_no_bug() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "launcher", "presets", "list"],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, check=False,
        )  # fmt: skip
    assert done.returncode == ExitCode.INTERNAL
    assert done.stderr == "error: No space left on device\n"


def shell(command: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """Runs a shell's line, in which ``$L`` is the launcher."""
    environment = os.environ | {"L": f"{sys.executable} -m launcher", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=cwd, check=False, env=environment
    )


@pytest.mark.parametrize("flag", ["--help", "--version", "presets list", "presets list -o json"])
def test_nobody_who_reads_is_no_failure(flag: str) -> None:
    for line in (f"$L {flag} >&-", f"set -o pipefail; $L {flag} | true"):
        done = shell(line)
        assert (done.returncode, done.stderr) == (0, ""), line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("flag", ["--help", "--version", "presets list -o json"])
def test_an_answer_that_cannot_be_written_is_told_in_one_line(flag: str) -> None:
    done = shell(f"$L {flag} >/dev/full")
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", ">/dev/full 2>&1", "-o json >/dev/full 2>&1"])
def test_an_error_that_cannot_be_told_keeps_its_exit_code(where: str) -> None:
    assert shell(f"$L status nope --root /nowhere {where}").returncode == ExitCode.RUN_NOT_FOUND


@pytest.mark.parametrize(
    "words",
    [
        "presets list",
        "submit --preset smoke --overlay tiny-cpu",
        "collect --run infl-a --results r",
        "status infl-a",
        "results list",
    ],
)
def test_a_current_directory_that_is_gone_is_named(words: str, tmp_path: Path) -> None:
    index = tmp_path / "index.sqlite"
    done = shell(f'mkdir d && cd d && rmdir "$PWD" && INFL_INDEX={index} $L {words}', cwd=tmp_path)
    assert done.stderr == "error: the current directory no longer exists\n  next: cd to one that does\n"
    assert done.returncode == ExitCode.USAGE


def test_the_documented_exit_codes() -> None:
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0, "INTERNAL": 1, "USAGE": 2, "SPEC": 3, "CONFLICT": 4, "BACKEND": 5, "INCOMPLETE": 6,
        "RUN_FAILED": 100, "RUN_UNFINISHED": 101, "RUN_NOT_FOUND": 102, "RUN_CANCELLED": 103,
        "INTERRUPTED": 130,
    }  # fmt: skip
    assert [int(code) for code in re.findall(r"(?<= )\d+", exit_codes_line())] == [
        int(code) for code in ExitCode
    ]
    kinds = LauncherError.__subclasses__()
    assert len(kinds) == 6
    assert len({kind.exit_code for kind in kinds}) == 6


# --- presets and render


def output(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    code = run(list(args))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_presets_list_names_and_describes(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "presets", "list")
    document = json.loads(output(capsys, "presets", "list", "-o", "json"))
    assert [entry["name"] for entry in document["overlays"]] == ["tiny-cpu", "tiny-gpu"]
    assert {"alltoken-timing", "capped512-timing", "smoke"} <= {
        entry["name"] for entry in document["presets"]
    }
    for entry in (*document["presets"], *document["overlays"]):
        assert entry["name"] in text
        assert entry["description"] in text
        assert entry["file"] in text


def test_presets_show_is_yaml_that_resolves_to_itself(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = ("smoke", "--overlay", "tiny-cpu", "--set", "model.path='Größe\u2028 \U0001f600 no'")
    text = output(capsys, "presets", "show", *args)
    document = json.loads(output(capsys, "presets", "show", *args, "--output", "json"))
    assert document["preset"] == "smoke"
    assert document["overlays"] == ["tiny-cpu"]
    assert parse_yaml(text, source="shown").data == yaml.safe_load(text) == document["settings"]
    shown = tmp_path / "shown.yaml"
    shown.write_text(text)
    assert output(capsys, "presets", "show", str(shown)) == text


def test_jobs_and_its_variable_add_folders(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.yaml").write_text(f"extends: smoke\ndescription: Number {name}.\n")
    assert "Number one." in output(capsys, "presets", "list", "--jobs", str(tmp_path / "one"))
    monkeypatch.setenv("INFL_JOBS", f"{tmp_path / 'one'}:{tmp_path / 'two'}")
    text = output(capsys, "presets", "list")
    assert "Number one." in text
    assert "Number two." in text
    assert json.loads(output(capsys, "render", "--preset", "two", "-ojson"))["run"].startswith("infl-two-")


def test_render_for_kubernetes_prints_the_manifest(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("render", "--preset", "smoke", "--name", "my-run", "--set", 'model.path="\\u2028\\x85 x"')
    manifest = yaml.safe_load(output(capsys, *args))
    assert (manifest["kind"], manifest["metadata"]["name"]) == ("Job", "my-run")
    document = json.loads(output(capsys, *args, "--output", "json"))
    assert set(document) == {"backend", "run", "spec_hash", "manifest"}
    assert (document["backend"], document["run"]) == ("kubernetes", "my-run")
    run_document = json.loads(
        document["manifest"]["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"]
    )
    assert run_document["spec"]["model"]["path"] == "\u2028\u0085 x"
    assert run_document["spec_hash"] == document["spec_hash"]


def test_render_for_the_local_backend_prints_run_json(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("render", "--preset", "smoke", "--overlay", "tiny-cpu", "--backend", "local", "--suffix", "b")
    text = output(capsys, *args, "--set", 'model.path="\\u2028\\x85 x"')
    document = json.loads(text)
    assert document["run"] == "infl-smoke-tiny-cpu-b"
    assert document["spec"]["model"]["path"] == "\u2028\u0085 x"
    assert document["provenance"]["command"][0] == "launcher"


def test_render_says_what_it_takes_for_granted(capsys: pytest.CaptureFixture[str]) -> None:
    run(["render", "--preset", "smoke"])
    assert "note: cluster.data_claim is null" in capsys.readouterr().err
    run(["render", "--preset", "smoke", "--overlay", "tiny-cpu"])
    assert capsys.readouterr().err == ""


def test_render_changes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for backend in ("kubernetes", "local"):
        output(capsys, "render", "--preset", "smoke", "--backend", backend)
    assert list(tmp_path.iterdir()) == []
