"""The click group: imports a command's module only when that command runs, and turns errors into exit codes.

Heavy libraries (pydantic, jinja2, kubernetes, numpy) are imported by the command that needs them.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Sequence
from itertools import pairwise

import click

from launcher import __version__
from launcher.cli import COMMANDS, OVERVIEW
from launcher.errors import ExitCode, LauncherError, UsageError, exit_codes_line


class LazyGroup(click.Group):
    """A group whose subcommands live in modules of their own, imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command: click.Command = importlib.import_module(entry[0]).command
        for each in (command, *getattr(command, "commands", {}).values()):
            if each.epilog is None:
                each.epilog = exit_codes_line()
        return command

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(OVERVIEW)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from launcher.suggest import did_you_mean

            hint = did_you_mean(args[0], COMMANDS)
            raise UsageError(
                f"no command '{args[0]}'" + (f"; {hint}" if hint else ""), next_step="launcher --help"
            )
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="launcher")
@click.option("--debug", is_flag=True, help="Show a traceback with errors.")
def cli(debug: bool) -> None:
    """Submit, watch and collect runs that trace the influence of every response token."""


# `launcher presets` alone asks what there is; click 8.2 and later raise, earlier ones print by themselves.
_HELP_IS_THE_ANSWER: tuple[type[click.UsageError], ...] = tuple(
    filter(None, [getattr(click.exceptions, "NoArgsIsHelpError", None)])
)


def run(args: list[str]) -> int:
    """Run one command line and return its exit code; prints errors as what, why and next step."""
    debug = "--debug" in args
    wants_json = _wants_json(args)
    try:
        result = cli.main(args=args, prog_name="launcher", standalone_mode=False)
    except LauncherError as error:
        if debug:
            _print_traceback()
        _print_error(error, wants_json)
        return int(error.exit_code)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.Abort:
        return int(ExitCode.INTERRUPTED)
    except _HELP_IS_THE_ANSWER as error:
        click.echo(error.format_message())
        return int(ExitCode.OK)
    except click.ClickException as error:
        _print_error(UsageError(error.format_message(), next_step=_help_for(error, args)), wants_json)
        return int(ExitCode.USAGE)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    except SystemExit:
        # No command calls sys.exit; click does where the reader went away (`launcher logs R | head`),
        # and then there is nobody left to tell.
        return int(ExitCode.OK)
    except OSError as error:
        if debug:
            _print_traceback()
        told = _as_launcher_error(error)
        _print_error(told, wants_json)
        return int(told.exit_code)
    except Exception as error:  # the last resort: a bug, told as one
        if debug:
            _print_traceback()
        _print_error(
            LauncherError(
                f"unexpected {type(error).__name__}: {error}",
                why="this is a bug in the launcher or something it did not foresee",
                next_step="run the same command with `launcher --debug ...` and report the traceback",
            ),
            wants_json,
        )
        return int(ExitCode.INTERNAL)
    return int(result) if isinstance(result, int) else int(ExitCode.OK)


def _as_launcher_error(error: OSError) -> LauncherError:
    try:
        os.getcwd()  # noqa: PTH109 - the question is whether this fails
    except FileNotFoundError:
        return UsageError("the current directory no longer exists", next_step="cd to one that does")
    where = f"{error.filename}: " if error.filename else ""
    return LauncherError(f"{where}{error.strerror or error}")


def _help_for(error: click.ClickException, args: Sequence[str]) -> str:
    """The help page nearest to a usage error; click's parser does not say in which command it was."""
    ctx: click.Context | None = getattr(error, "ctx", None)
    if ctx is not None:
        return f"{ctx.command_path} --help"
    return f"launcher {args[0]} --help" if args and args[0] in COMMANDS else "launcher --help"


def _print_traceback() -> None:
    import traceback  # not for the commands that succeed

    traceback.print_exc()


def _wants_json(args: Sequence[str]) -> bool:
    """Errors follow ``--output json`` too, even when parsing the arguments is what failed."""
    return any(arg in ("--output=json", "-ojson") for arg in args) or any(
        flag in ("--output", "-o") and value == "json" for flag, value in pairwise(args)
    )


def _print_error(error: LauncherError, wants_json: bool) -> None:
    from launcher.output import note

    if wants_json:
        try:
            click.echo(json.dumps(error.as_dict(), indent=2, sort_keys=True))
            return
        except OSError:
            pass  # standard output may be what failed
    for label, text in (("error: ", error.what), ("  why:  ", error.why), ("  next: ", error.next_step)):
        if text:
            first, *others = text.split("\n")
            note(f"{label}{first}")
            for line in others:  # set in, so that none can pose as the next part
                note(line if line.startswith(" " * len(label)) else " " * len(label) + line)
