"""Names of runs: what is allowed, and how one is made from a preset."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from influence.rundir.errors import RunNameError

MAX_RUN_NAME = 34
"""Characters. Kubernetes allows 63 in a label; controllers append suffixes for pods and services."""

# RFC 1035, not 1123: a name that starts with a digit is refused for Services, which multi-node jobs need.
_LABEL = re.compile(r"[a-z](?:[a-z0-9-]*[a-z0-9])?")

# On a cluster the second object of a run has this name: one that ended is never deleted to be made again.
_GENERATION = re.compile(r"(.*)-r((?:[2-9]|[1-9][0-9]+))")


def validate_run_name(name: str) -> str:
    """The name itself, if a run can have it.

    Raises:
        RunNameError: says what is wrong and suggests a valid name.
    """
    problem = None
    if not name:
        problem = "it is empty"
    elif len(name) > MAX_RUN_NAME:
        problem = f"it has {len(name)} characters, at most {MAX_RUN_NAME} are allowed"
    elif not _LABEL.fullmatch(name):
        problem = _what_is_wrong(name)
    if problem:
        raise RunNameError(
            None,
            f"{_quoted(name)} cannot be the name of a run: {problem}",
            f"use a DNS label such as {_suggestion(name)!r}",
        )
    return name


def validate_new_run_name(name: str) -> str:
    """The name itself, if a run that is not there yet can have it; one that is there may be named otherwise.

    Raises:
        RunNameError: as `validate_run_name`, or the name is that of another run's second start.
    """
    match = _GENERATION.fullmatch(validate_run_name(name))
    if match:
        raise RunNameError(
            None,
            f"{_quoted(name)} cannot be the name of a new run: so a cluster names start {match[2]} of the "
            f"run {_quoted(match[1])}",
            f"use another ending than -r and a number, such as {f'{match[1]}-v{match[2]}'!r}",
        )
    return name


def run_name(preset: str, overlays: Sequence[str], suffix: str) -> str:
    """``infl-<preset>[-<overlay>...]-<suffix>``, a valid name.

    A name that would be too long loses the end of its middle part and gains four hexadecimal digits of the
    whole, so that two long names that differ only at the end stay apart.

    Args:
        preset, overlays: names of files without their ending; characters that no label has become hyphens.
        suffix: a date or a digest, kept as it is.

    Raises:
        RunNameError: the suffix makes no valid name.
    """
    middle = "-".join(filter(None, (_slug(part) for part in (preset, *overlays))))
    name = f"infl-{middle}-{suffix}"
    num_excess = len(name) - MAX_RUN_NAME
    if 0 < num_excess <= len(middle) - _MIN_SHORTENED:
        digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:4]
        kept = middle[: len(middle) - num_excess - len("-") - len(digest)].rstrip("-")
        name = f"infl-{kept}-{digest}-{suffix}"
    return validate_new_run_name(name)


_MIN_SHORTENED = 6  # one letter, a hyphen and four digits


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _suggestion(name: str) -> str:
    slug = _slug(name)
    if slug and not slug[0].isalpha():
        slug = f"run-{slug}"
    return slug[:MAX_RUN_NAME].rstrip("-") or "infl-my-run"


def _what_is_wrong(name: str) -> str:
    foreign = sorted(set(re.sub(r"[a-z0-9-]", "", name)))
    if foreign:
        shown = " ".join(_quoted(character) for character in foreign[:8])
        return f"it contains {shown}; only a-z, 0-9 and '-' are allowed"
    if not name[0].isalpha():
        return "it does not start with a letter"
    return "it ends with a hyphen"


def _quoted(text: str) -> str:
    """As Python writes it in ASCII, cut short: a name may hold control characters or be a whole file."""
    return ascii(text) if len(text) <= 2 * MAX_RUN_NAME else ascii(text[: 2 * MAX_RUN_NAME]) + "..."
