"""What looks like a secret, so that none gets into a spec, a manifest or a run directory.

Secrets travel by reference only: a Kubernetes Secret (``cluster.secret``), or the environment of a local run.
"""

from __future__ import annotations

import re

_SECRET_KEY = re.compile(
    r"(api_?key|access_?key(_id)?|secret_?(key)?|private_?key|passw(or)?d|passphrase|credentials?"
    r"|(^|\.)token|(api|auth|access|refresh|bearer|hub|hf|github|gitlab)_?token)$"
)
_SECRET_VALUE = re.compile(
    r"""
      [0-9a-f]{40}                                      # an API key of Weights & Biases
    | (local-|wandb_v\d_)[\w-]{20,}                     # its newer forms
    | hf_[A-Za-z0-9]{20,}                               # Hugging Face
    | (gh[pousr]_|github_pat_|glpat-)[\w-]{16,}         # GitHub, GitLab
    | sk-[\w-]{16,}                                     # OpenAI and those that copied its form
    | (AKIA|ASIA)[A-Z0-9]{16}                           # AWS
    | eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*                # a JSON web token
    | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----.*
    | [a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@.*         # a URL with a password
    """,
    re.VERBOSE | re.DOTALL,
)


def is_secret_key(key: str) -> bool:
    """Whether a free-form key, such as ``env_vars.WANDB_API_KEY``, says that its value is a secret."""
    return _SECRET_KEY.search(key.lower().replace("-", "_")) is not None


def is_secret_value(text: str) -> bool:
    """Whether the whole text has the form of a well-known kind of secret."""
    return _SECRET_VALUE.fullmatch(text.strip()) is not None


def redacted(text: str) -> str:
    """``text``, with ``***`` in place of what looks secret: the whole, or the value of ``key=value``."""
    key, equals, value = text.rpartition("=")
    if is_secret_value(text) or (equals and (is_secret_value(value) or is_secret_key(key))):
        return f"{key}=***" if equals else "***"
    return text
