"""Ties the tracer to verl 0.9.1, without a fork: an engine, a trainer subclass, and their configuration."""
