"""What somebody may have meant by a word that is not there."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``did you mean a or b?``: what begins with the word, else what is written alike; or an empty text."""
    names = list(known)
    near = [name for name in names if word and name.startswith(word)] or get_close_matches(word, names)
    return f"did you mean {' or '.join(near[:3])}?" if near else ""
