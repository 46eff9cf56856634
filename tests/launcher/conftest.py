"""Fixtures of the launcher's tests."""

from tests.launcher.local_run import local_run

__all__ = ["local_run"]
