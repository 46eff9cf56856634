"""Where the presets and templates lie: in the installed wheel, or at the top of a source checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_DATA = _PACKAGE / "_data"  # filled by the wheel's force-include


def checkout_dir() -> Path | None:
    """The top of the source tree that this package is imported from; None for an installed wheel."""
    top = _PACKAGE.parent
    is_checkout = not _DATA.is_dir() and (top / "pyproject.toml").is_file() and (top / "jobs").is_dir()
    return top if is_checkout else None


def shipped_jobs_dir() -> Path:
    """The folder of presets that ship with the launcher; its ``overlays`` lie inside."""
    return (checkout_dir() or _DATA) / "jobs"


def templates_dir() -> Path:
    """The folder of job templates."""
    return (checkout_dir() or _DATA) / "templates"
