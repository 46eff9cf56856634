"""Where a command works: this machine, or a cluster that ``launcher.yaml`` describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOCAL = "local"
DEFAULT_NAMESPACE = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunaiAccess:
    """How Run:ai's control plane is reached; its secret stays in the environment until it is sent."""

    url: str
    """``https://lab.run.ai``, without a path."""
    project: str
    """The project's name; its namespace is ``runai-<project>`` unless the profile says otherwise."""
    cluster: str | None = None
    """The cluster's name or UUID; None where the control plane has only one."""
    client_id_variable: str = "RUNAI_CLIENT_ID"
    client_secret_variable: str = "RUNAI_CLIENT_SECRET"  # noqa: S105 - a variable's name
    ca_file: Path | None = None
    """Certificates to trust instead of the system's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One place where runs execute, by the name that ``--cluster`` takes."""

    name: str
    backend: str
    """A key of ``launcher.backends.BACKENDS``."""
    root: Path | None = None
    """The folder of run directories as this machine sees it; None where it does not (a claim that only the
    cluster mounts)."""
    kubeconfig: Path | None = None
    """None: KUBECONFIG, then ``~/.kube/config``, then the pod's own service account."""
    context: str | None = None
    """None: the kubeconfig's current context."""
    namespace: str = DEFAULT_NAMESPACE
    """Where the runs' objects live: the profile's ``cluster.namespace``."""
    runai: RunaiAccess | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Sections of a preset that the profile sets for its site, laid between the overlays and ``--set``."""
    source: str = ""
    """The file and line where it stands, for messages."""
    options: tuple[str, ...] = ()
    """The options that choose it, for the commands that are suggested; none where it is chosen anyway."""
