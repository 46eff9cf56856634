"""Which version of this package runs here."""

from __future__ import annotations

from importlib import metadata


def installed_version() -> str:
    """The installed package's version; ``unknown`` where it runs from a source tree that is not installed."""
    try:
        return metadata.version("influence-launcher")
    except metadata.PackageNotFoundError:
        return "unknown"
