"""How a reference to an image reads: ``[registry[:port]/]name[:tag][@sha256:digest]``."""

from __future__ import annotations

import re
from dataclasses import dataclass

# The grammar of registries and kubelets (distribution/reference). What stands before the first slash is a
# registry only with a dot, a port or a capital in it, or as localhost; names themselves have no capitals.
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
_REGISTRY = rf"(?=[^/]*[.:A-Z]|localhost/){_LABEL}(\.{_LABEL})*(:[0-9]{{1,5}})?"
_NAME = r"[a-z0-9]+((\.|__?|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?P<repository>(?=[^@]{{1,255}}(@|$))({_REGISTRY}/)?{_NAME}(/{_NAME})*)"
    r"(:(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?"
    r"(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
EXAMPLE = "registry.example.com/team/name:tag@sha256:..."


@dataclass(frozen=True, slots=True)
class ImageReference:
    """``[registry[:port]/]name[:tag][@sha256:digest]``, in its parts."""

    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> ImageReference:
        """The parts of a reference.

        Raises:
            ValueError: it is none; the message says what one looks like.
        """
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no image reference, such as {EXAMPLE}")
        return cls(match["repository"], match["tag"], match["digest"])

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return self.repository + tag + (f"@{self.digest}" if self.digest else "")

    @property
    def pull_name(self) -> str:
        """What a registry is asked for: the digest alone where there is one, as a cluster does."""
        return f"{self.repository}@{self.digest}" if self.digest else str(self)
