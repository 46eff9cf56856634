"""What looks like a secret, so that none gets into a spec, a manifest or a run directory.

Secrets travel by reference only: a Kubernetes Secret (``cluster.secret``), or the environment of a local run.
"""

from __future__ import annotations

import re

_SECRET_WORD = re.compile(
    r".*(token|password|passwd|passphrase|secret|credential|apikey|accesskey|secretkey|privatekey)s?"
    r"|(key|pass|pwd|bearer|auth|authorization)s?"
)
#: Keys of verl, of tokenizers and of inference engines that end in such a word and hold no secret.
_HARMLESS = re.compile(
    r"""
      (pad|bos|eos|unk|sep|cls|mask|image|video|audio|vision|stop|start|end|special|think|prefix|suffix)_token
    | (skip|add|ignore|include|additional|extra|use|return|keep|num|stop|bad|allowed)_(\w+_)?tokens
    | (\w+_)?(max|min|num|total|avg|mean)_(\w+_)?tokens?
    | (prompt|image|video|audio|reward_fn|reward_model|teacher|response|label|sort|group|sample|index)_key
    | (forward|backward|single)_pass
    """,
    re.VERBOSE,
)
_HARMLESS_PATHS = ("distillation.teacher_models.teacher_model.key",)  # the data source that a teacher is for

_SECRET_TEXT = re.compile(
    r"""
      (?<![0-9A-Za-z])[0-9a-f]{40}(?![0-9A-Za-z])               # an API key of Weights & Biases
    | (?<![\w-])(local-[0-9a-f]{20,}|wandb_v\d_[\w-]{20,})      # its newer forms
    | (?<![0-9A-Za-z])hf_[A-Za-z0-9]{20,}                       # Hugging Face
    | (?<![0-9A-Za-z])(gh[pousr]_|github_pat_|glpat-)[\w-]{16,} # GitHub, GitLab
    | (?<![\w-])sk-(?=[\w-]*[0-9])[\w-]{16,}                    # OpenAI and those that copied its form
    | (?<![\w-])xox[abeoprs]-[\w-]{10,}                         # Slack
    | (?<![0-9A-Za-z])(AKIA|ASIA)[A-Z0-9]{16}(?![0-9A-Za-z])    # AWS
    | (?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.                    # a JSON web token
    | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY
    | (?i:\bbearer)\s+(?=\S*[0-9])\S{6,}
    | (?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]*://(?!git@)[^/\s?\#@]+@   # a URL with a user: often a token
    """,
    re.VERBOSE,
)
# A commit has the form of W&B's key; it stands behind an image's name or in the path of a revision.
_COMMIT = re.compile(r"(/[\w.-]+[:@]|/(?:snapshots|revision|commit|tree|blob|resolve)/)[0-9a-f]{40}(?![\w@])")
_ASSIGNED = re.compile(r"(?<![\w.+-])([\w.+-]{2,128})=(?=\S)")
_CAMEL_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NUMBERED = re.compile(r"_?[0-9]+$")


def is_secret_key(key: str) -> bool:
    """Whether a free-form key, such as ``env_vars.WANDB_API_KEY``, says that its value is a secret."""
    key = key.removeprefix("+")
    return key not in _HARMLESS_PATHS and any(_names_a_secret(part) for part in re.split(r"[./+\s]", key))


def is_secret_value(text: str) -> bool:
    """Whether a well-known kind of secret stands in the text, or is assigned in it (``TOKEN=...``)."""
    return _secret_start(text) is not None


def holds_secret(text: str) -> bool:
    """Whether a well-known kind of secret stands in the text. In source code, unlike in a setting, something
    assigned to a ``token`` is hardly ever one, so that names mean nothing here."""
    return _SECRET_TEXT.search(_without_commits(text)) is not None


def redacted(text: str) -> str:
    """``text``, with ``***`` in place of what looks secret: the whole, or the value of ``key=value``."""
    key, equals, _ = text.partition("=")
    start = len(key) + 1 if equals and is_secret_key(key) else _secret_start(text)
    return text if start is None else text[: text.rfind("=", 0, start) + 1] + "***"


def _secret_start(text: str) -> int | None:
    found = _SECRET_TEXT.search(_without_commits(text))
    starts = [found.start()] if found else []
    for assigned in _ASSIGNED.finditer(text):
        # A folder named key=3 is a partition of a data set.
        if assigned[1] != "key" and is_secret_key(assigned[1]):
            starts.append(assigned.end())
            break
    return min(starts, default=None)


def _without_commits(text: str) -> str:
    # Blotted out in its own length, so that places in the text stay what they are.
    return _COMMIT.sub(lambda commit: commit[1] + 40 * "-", text)


def _names_a_secret(part: str) -> bool:
    name = _NUMBERED.sub("", _CAMEL_HUMP.sub("_", part).lower().replace("-", "_"))
    if _HARMLESS.fullmatch(name):
        return False
    name = name.removesuffix("_id") if name.endswith("access_key_id") else name
    return _SECRET_WORD.fullmatch(name.rpartition("_")[2]) is not None
