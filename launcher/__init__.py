"""Submits, watches and collects token-influence runs; see ``ARCHITECTURE.md``."""

__version__ = "0.1.0"
