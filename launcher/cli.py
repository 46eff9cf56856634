"""The command line's front door: answers ``--help`` and ``--version`` itself, hands the rest to click.

Importing click costs about 65 ms of CPU; the overview of commands, the most frequent first contact,
needs none of it. ``launcher.group`` holds the click group and prints the same text.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from launcher import __version__

# name -> (module, help line). The help line stands here so that `--help` imports no command.
COMMANDS: dict[str, tuple[str, str]] = {
    "submit": ("launcher.commands.submit", "Start a run of a preset, or adopt the one that exists."),
    "render": ("launcher.commands.render", "Print what submit would send to a backend."),
    "status": ("launcher.commands.status", "Show runs: state, reason, committed steps, next command."),
    "logs": ("launcher.commands.logs", "Print or follow the log of an attempt."),
    "explain": ("launcher.commands.explain", "Tell what ended each attempt of a run, and what followed."),
    "events": ("launcher.commands.events", "List what happened to a run, as its backend tells it."),
    "cancel": ("launcher.commands.cancel", "Stop a run and everything it started."),
    "suspend": ("launcher.commands.suspend", "Let a run give its machines back, to go on later."),
    "resume": ("launcher.commands.resume", "Let a suspended run go on."),
    "collect": ("launcher.commands.collect", "Copy a run's results, verified, and index them."),
    "results": ("launcher.commands.results", "List, show or rebuild the index of collected results."),
    "presets": ("launcher.commands.presets", "List presets and overlays, or show one resolved."),
    "image": ("launcher.commands.image", "Print how the image is built, or check that one fits this code."),
    "doctor": ("launcher.commands.doctor", "Check what runs need of a cluster or of this machine."),
}

# New objects before Python first looks for cycles among them, 700 otherwise. What a command makes lives until
# it ends (modules, hundreds of Jobs), and to look through it again and again would take a tenth of its time.
_FIRST_SEARCH = 100_000

OVERVIEW = "\n".join(
    [
        "Usage: launcher [--debug] COMMAND [ARGS]...",
        "",
        "  Submit, watch and collect runs that trace the influence of every response token.",
        "",
        "Options:",
        "  --debug     Show a traceback with errors.",
        "  --version   Show the version and exit.",
        "  -h, --help  Show this message and exit.",
        "",
        "Commands:",
        *(f"  {name:<9} {line}" for name, (_, line) in COMMANDS.items()),
        "",
        "`launcher COMMAND --help` explains a command. A first run on any machine:",
        "  launcher submit --preset alltoken-timing --overlay tiny-cpu --follow",
        "",
    ]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the documented code (``launcher.errors.ExitCode``).

    Args:
        argv: None: those of this process, which is the launcher's own then.
    """
    if argv is None:
        gc.set_threshold(_FIRST_SEARCH, 20, 20)
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        code = _print(OVERVIEW)
    elif args[0] == "--version":
        code = _print(f"launcher, version {__version__}\n")
    else:
        from launcher.group import run

        code = run(args)
    _settle_streams()
    if argv is None:
        gc.freeze()  # the process ends: nothing of what is left is worth a search
    sys.exit(code)


def _print(text: str) -> int:
    """Write the answer; a reader that went away, or that never was (``>&-``), is no failure."""
    if sys.stdout is None:
        return 0
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        return 0
    except OSError as error:
        if sys.stderr is not None:
            with suppress(OSError):
                sys.stderr.write(f"error: {error.strerror}\n")
        return 1
    return 0


def _settle_streams() -> None:
    """What cannot be written was told already; Python's own flush at the exit must not add a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
