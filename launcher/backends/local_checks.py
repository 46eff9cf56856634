"""What a run needs of this machine, for ``launcher doctor``."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from influence.machine import this_machine
from influence.rundir import RunSpec
from launcher.backends.local import lacking_packages
from launcher.doctor import Check
from launcher.machine import enumerated, lacking
from launcher.places import local_root
from launcher.profiles import Profile


def checks(profile: Profile, run: RunSpec | None) -> Iterator[Check]:
    """The packages, the machine, the folder of run directories, W&B's key."""
    yield _packages()
    yield _machine(profile, run)
    yield _root(local_root(profile.root))
    yield _wandb_key(run)


def _packages() -> Check:
    missing = lacking_packages()
    if missing:
        return Check(
            name="trainer", outcome="failed", detail=f"this Python lacks {missing[0].partition(';')[0]}",
            next_step="pip install 'influence-launcher[trainer]'",
        )  # fmt: skip
    return Check(name="trainer", outcome="ok", detail="torch, verl and ray are installed")


def _machine(profile: Profile, run: RunSpec | None) -> Check:
    here = this_machine(local_root(profile.root))
    if run is not None and (missing := lacking(run.spec, here)):
        return Check(
            name="machine", outcome="failed",
            detail=f"preset '{run.spec['preset']}' needs {enumerated(missing)}",
            next_step="choose --overlay tiny-cpu, smaller settings, or a cluster",
        )  # fmt: skip
    gpus = f"{here.num_gpus} GPUs" if here.num_gpus else "no GPU"
    found = f"{here.num_cpus:g} CPUs, {here.memory_bytes / 2**30:.0f} GiB of memory, {gpus}"
    return Check(name="machine", outcome="ok", detail=found)


def _root(root: Path) -> Check:
    above = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
        return Check(name="root", outcome="ok", detail=f"{root} can be written")
    return Check(
        name="root", outcome="failed", detail=f"{root} cannot be written, since {above} cannot",
        next_step="change its owner or mode, or choose another folder with --root or INFL_ROOT",
    )  # fmt: skip


def _wandb_key(run: RunSpec | None) -> Check:
    """Whether a key is there; what it is, and whether it is good, is not looked at."""
    mode = None if run is None else run.spec["wandb"]["mode"]
    if mode in ("offline", "disabled"):
        return Check(name="W&B key", outcome="ok", detail=f"not needed: wandb.mode is {mode}")
    if os.environ.get("WANDB_API_KEY"):
        return Check(name="W&B key", outcome="ok", detail="WANDB_API_KEY is set")
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "")).hostname or "api.wandb.ai"
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        if netrc.netrc(str(path)).authenticators(host):
            return Check(name="W&B key", outcome="ok", detail=f"{path} has one for {host}")
        why = f"{path} has none for {host}"
    except FileNotFoundError:
        why = f"there is no {path}"
    except (OSError, netrc.NetrcParseError):  # whose text may quote a line of the file
        why = f"{path} cannot be read"
    return Check(
        name="W&B key",
        outcome="warning" if mode is None else "failed",
        detail=f"WANDB_API_KEY is not set, and {why}",
        next_step="wandb login, or submit with --set wandb.mode=offline",
    )
