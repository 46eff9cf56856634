"""The schema of ``launcher.yaml``: the clusters that a project or a user works with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, create_model
from pydantic_core import PydanticCustomError

from launcher.model.fields import DnsLabel, Section, Text
from launcher.model.rules import Problem
from launcher.model.sections import Settings

RESERVED = "local"
_BACKENDS = ("kubernetes", "kuberay", "runai")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _server(text: str) -> str:
    """``https://host[:port]``; plain HTTP only to this machine, since a secret travels over it."""
    url = urlsplit(text)
    try:
        url.port  # noqa: B018 - raises where it is no number
    except ValueError:
        raise PydanticCustomError("text", "must be a URL such as https://lab.run.ai") from None
    if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc:
        raise PydanticCustomError("text", "must be a URL such as https://lab.run.ai")
    if url.path.strip("/") or url.query or url.fragment:
        raise PydanticCustomError("text", "must be the server alone, such as https://lab.run.ai")
    if url.scheme == "http" and url.hostname not in _LOOPBACK:
        raise PydanticCustomError("text", "must begin with https://, since a secret is sent there")
    return f"{url.scheme}://{url.netloc}"


def _variable(text: str) -> str:
    # Upper case only: a secret that was pasted here by mistake is hardly ever that, and is not repeated.
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,127}", text):
        raise PydanticCustomError("text", "must be an environment variable's name, such as RUNAI_CLIENT_ID")
    return text


Server = Annotated[str, AfterValidator(_server)]
Variable = Annotated[str, AfterValidator(_variable)]


class Runai(Section):
    url: Server
    project: Annotated[DnsLabel, Field(max_length=63 - len("runai-"))]
    cluster: Text | None = None
    client_id_variable: Variable = "RUNAI_CLIENT_ID"
    client_secret_variable: Variable = "RUNAI_CLIENT_SECRET"  # noqa: S105 - a variable's name
    ca_file: Text | None = None


def _partial(section: type[Section]) -> type[Section]:
    """The section with nothing required: a profile sets what differs at its site."""
    fields: dict[str, Any] = {
        name: (field.rebuild_annotation(), None) for name, field in section.model_fields.items()
    }
    partial: type[Section] = create_model(section.__name__, __base__=Section, **fields)
    return partial


def _cluster_profile() -> type[Section]:
    fields: dict[str, Any] = {
        "backend": (Literal[_BACKENDS], ...),
        "kubeconfig": (Text | None, None),
        "context": (Text | None, None),
        "root": (Text | None, None),
        "runai": (Runai | None, None),
    }
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        is_section = isinstance(kind, type) and issubclass(kind, Section)
        fields[name] = ((_partial(kind) if is_section else kind) | None, None)  # type: ignore[arg-type, operator]
    profile: type[Section] = create_model("ClusterProfile", __base__=Section, **fields)
    return profile


OWN_KEYS = ("backend", "kubeconfig", "context", "root", "runai")
"""A profile's keys that are no sections of a preset."""
USERS_OWN = (
    ("kubeconfig",), ("runai", "url"), ("runai", "ca_file"), ("runai", "client_id_variable"),
    ("runai", "client_secret_variable"),
)  # fmt: skip
"""A profile's keys that a project's file may not set: a kubeconfig can name a program to run, and the others
say which variable's value is sent to whom."""
ClusterProfile = _cluster_profile()


class LauncherYaml(Section):
    default_cluster: Text | None = None
    clusters: dict[str, ClusterProfile] = {}  # type: ignore[valid-type] # noqa: RUF012 - pydantic copies it


def broken_cluster_rules(document: LauncherYaml) -> Iterator[Problem]:
    """What single values do not show."""
    names = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
    for name, profile in document.clusters.items():
        path = ("clusters", name)
        backend = profile.backend  # type: ignore[attr-defined]
        if not names.fullmatch(name):
            yield Problem(path, "a cluster's name must be of lower-case letters, digits and '-', at most 63")
        elif name == RESERVED:
            yield Problem(path, "this name is taken: it means this machine; choose another")
        elif name in _BACKENDS and backend != name:
            yield Problem((*path, "backend"), f"must be {name} for a cluster of this name, not {backend}")
        if backend == "runai" and profile.runai is None:  # type: ignore[attr-defined]
            yield Problem((*path, "runai"), "missing: backend runai needs its url and project")
        if backend != "runai" and profile.runai is not None:  # type: ignore[attr-defined]
            yield Problem((*path, "runai"), f"goes with backend: runai, not {backend}")
