"""What is made once a machine: a directory in the user's cache, named by a hash of its settings."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/influence-launcher``, by default in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "influence-launcher"


def cached_directory(
    kind: str, settings: Mapping[str, Any], build: Callable[[Path], None], root: Path | None = None
) -> Path:
    """The directory that ``build`` fills for these settings, made now unless it is there.

    It appears whole or not at all: ``build`` writes into a temporary sibling, which is then renamed. Of two
    builders at the same time the first wins, and the other's equal copy is dropped.

    Raises:
        OSError: the cache directory cannot be written.
    """
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    target = (root or cache_root()) / kind / digest
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{digest}-", dir=target.parent))
    try:
        build(temporary)
        (temporary / "settings.json").write_text(json.dumps(settings, sort_keys=True, indent=2) + "\n")
        with contextlib.suppress(FileExistsError, OSError):
            temporary.rename(target)
        if not target.is_dir():
            raise OSError(f"{target} could not be made")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
