"""From a preset to a run: its resolved spec and hash, its name, where it came from, its W&B identity."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from influence.rundir.clock import utc_now
from influence.rundir.errors import RunNameError
from influence.rundir.names import run_name, validate_new_run_name
from influence.rundir.spec import RunSpec, spec_hash
from launcher import __version__
from launcher.errors import UsageError
from launcher.git import CodeVersion, code_version
from launcher.presets import PresetLibrary, Resolved
from launcher.profiles import LOCAL, Profile
from launcher.secrets import redacted

HASH_SUFFIX = "hash"


def resolve_run(
    preset: str,
    overlays: Sequence[str] = (),
    sets: Sequence[str] = (),
    name: str | None = None,
    suffix: str | None = None,
    *,
    jobs_dirs: Sequence[Path] = (),
    profile: Profile | None = None,
    code: CodeVersion | None = None,
    command: Sequence[str] | None = None,
    today: date | None = None,
) -> RunSpec:
    """What ``submit`` submits and ``render`` renders; reads files and git, writes nothing.

    Args:
        preset: a preset's name, or the path of a YAML file.
        overlays: names or paths; later wins.
        sets: ``path.to.setting=value``; later wins.
        name: the run's whole name; by default ``infl-<preset>[-<overlay>...]-<suffix>``.
        suffix: the end of the name, by default today's month and day (``0221``); ``hash``: four digits of the
            spec hash.
        jobs_dirs: the user's folders of presets, searched before the shipped one.
        profile: where the run is to execute; its settings are laid between the overlays and ``sets``.
        code: the code version; by default asked of git.
        command: the command line to record; by default this process's.
        today: the date of the default suffix.

    Raises:
        UsageError: an unknown preset or overlay, a name that no run can have.
        SpecError: anything wrong in a preset, an overlay or a ``--set``.
    """
    if name is not None and suffix is not None:
        raise UsageError("--name and --suffix exclude each other", why="--suffix is a part of the name")
    site = None if profile is None else profile.layer()
    resolved = PresetLibrary(jobs_dirs).resolve(preset, overlays, sets, site=site)
    spec = build_spec(resolved, code_version() if code is None else code)
    digest = spec_hash(spec)
    run = _name(resolved, digest, name, suffix, date.today() if today is None else today)
    return RunSpec(
        run=run,
        spec=spec,
        spec_hash=digest,
        provenance=_provenance(sys.argv[1:] if command is None else command, profile),
        wandb=wandb_identity(spec["wandb"], run),
    )


def build_spec(resolved: Resolved, code: CodeVersion) -> dict[str, Any]:
    """All that decides what a run computes: the settings, what they were made of, and the code."""
    return {
        **resolved.settings,
        "preset": resolved.preset,
        "overlays": list(resolved.overlays),
        "code": code.as_dict(),
    }


def wandb_identity(settings: dict[str, Any], run: str) -> dict[str, Any]:
    """The ``wandb`` of ``run.json``: one W&B run for all attempts, its id the run's name.

    The entity is the preset's, else that of ``WANDB_ENTITY``, as W&B itself has it. The link is built, not
    looked up, so it is unverified; None where the entity is not known beforehand.
    """
    entity, project = settings["entity"] or os.environ.get("WANDB_ENTITY") or None, settings["project"]
    url = None
    if settings["mode"] != "disabled" and entity:
        url = f"{_wandb_app()}/{quote(entity, safe='')}/{quote(project, safe='')}/runs/{quote(run, safe='')}"
    return {"mode": settings["mode"], "entity": entity, "project": project, "run_id": run, "url": url}


def _wandb_app() -> str:
    """Where people read W&B: its cloud, or the server that ``WANDB_BASE_URL`` names."""
    base = urlsplit(os.environ.get("WANDB_BASE_URL", ""))
    if not base.hostname or base.hostname == "api.wandb.ai":
        return "https://wandb.ai"
    return f"{base.scheme}://{base.netloc.rpartition('@')[2]}"  # a password stays out of the link


def _name(resolved: Resolved, digest: str, name: str | None, suffix: str | None, today: date) -> str:
    if suffix == HASH_SUFFIX:
        suffix = digest.removeprefix("sha256:")[:4]
    try:
        if name is not None:
            return validate_new_run_name(name)
        return run_name(resolved.preset, resolved.overlays, f"{today:%m%d}" if suffix is None else suffix)
    except RunNameError as error:
        raise UsageError(error.reason, next_step=error.next_step) from None


def _provenance(argv: Sequence[str], profile: Profile | None) -> dict[str, Any]:
    return {
        "user": _user(),
        "host": socket.gethostname(),
        "created_at": utc_now(),
        "command": ["launcher", *(_text(redacted(arg)) for arg in argv)],
        "launcher_version": __version__,
        "cluster": LOCAL if profile is None else profile.name,
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a line in /etc/passwd
        return f"uid-{os.getuid()}"


def _text(arg: str) -> str:
    """An argument as valid Unicode: a file name may hold bytes that are none."""
    return arg.encode(errors="surrogateescape").decode(errors="backslashreplace")
