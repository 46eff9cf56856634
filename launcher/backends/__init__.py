"""Where runs execute: one module a backend."""
