"""Where a command works: this machine, or a cluster that ``launcher.yaml`` describes.

A project's ``launcher.yaml`` is searched from the current folder upwards to the top of the repository; the
user's own, in the configuration folder, is laid over it key by key. Neither is needed: this machine, and the
cluster of the kubeconfig's current context, have names of their own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.errors import LauncherError, UsageError
from launcher.suggest import did_you_mean

if TYPE_CHECKING:
    from launcher.launcher_yaml import Clusters
    from launcher.yaml_source import KeyPath, Place, YamlSource

LOCAL = "local"
FILE_NAME = "launcher.yaml"
CLUSTER_VARIABLE = "INFL_CLUSTER"
CONFIG_VARIABLE = "INFL_CONFIG"
#: Profiles that exist without a file: this machine, and the kubeconfig's current context.
IMPLICIT = (LOCAL, "kubernetes", "kuberay")
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
    places: Mapping[KeyPath, Place] = field(default_factory=dict)
    """Where each of ``settings`` stands, for messages."""
    source: str = ""
    """The file and line where it stands, for messages."""
    options: tuple[str, ...] = ()
    """The options that choose it, for the commands that are suggested; none where it is chosen anyway."""

    def layer(self) -> YamlSource | None:
        """The settings as a layer over a preset's; None where the profile sets none."""
        if not self.settings:
            return None
        from launcher.layers import all_paths
        from launcher.yaml_source import Place, YamlSource

        here = Place(self.source or f"cluster '{self.name}'")
        places = {path: self.places.get(path, here) for path in all_paths(self.settings, ())}
        return YamlSource(dict(self.settings), places)


def choose_profile(
    cluster: str | None = None,
    config: Path | None = None,
    backend: str | None = None,
    *,
    offline: bool = False,
) -> Profile:
    """The profile that the options and the environment mean.

    Args:
        cluster: a profile's name; None: that of ``INFL_CLUSTER``, else ``default_cluster``, else ``local``.
        config: the one file to read; None: that of ``INFL_CONFIG``, else the project's and the user's.
        backend: what the profile's backend must be. Where no cluster is named, one of that backend is meant.
        offline: no server is to be asked: a Run:ai that nobody described will do.

    Raises:
        UsageError: no such cluster or file, several that may be meant, or one of another backend.
        SpecError: a ``launcher.yaml`` is not valid.
    """
    named = cluster or os.environ.get(CLUSTER_VARIABLE) or None
    files = config_files(config)
    clusters = None
    if files and named != LOCAL:
        from launcher.launcher_yaml import read_clusters  # imports pydantic and YAML

        clusters = read_clusters(files, project=_unasked_file(config))
    default = (clusters.default if clusters else None) or LOCAL
    unread = bool(files) and clusters is None
    if clusters is not None and named is None:
        clusters.require_default()
    profile = _find(named or default, clusters)
    if backend is not None and profile.backend != backend:
        if named is not None:
            raise UsageError(
                f"cluster '{profile.name}' is of the backend {profile.backend}, not {backend}",
                next_step=f"leave out --backend, or {_choice_of(backend, clusters)}",
            )
        profile = _of_backend(backend, clusters, offline=offline)
    return replace(profile, options=_options(profile.name, config, None if unread else default))


def described_clusters() -> Clusters | None:
    """What the files that are read without ``--config`` say, for hints; None where there are none to read."""
    try:
        files = config_files()
        if not files:
            return None
        from launcher.launcher_yaml import read_clusters

        return read_clusters(files)
    except LauncherError:
        return None


def several_nodes_step() -> str:
    """What to do with a run of several nodes in a place that has one, in words."""
    return _choice_of("kuberay", described_clusters())


def config_files(config: Path | None = None) -> list[Path]:
    """The files to read, the later laid over the earlier; asks the file system and reads none of them.

    Raises:
        UsageError: the file that was named is not there.
    """
    config = _named_file(config)
    if config is not None:
        if not config.is_file():
            raise UsageError(f"no such file: {config}", next_step=f"check --config and {CONFIG_VARIABLE}")
        return [config]
    return [path for path in (_unasked_file(None), own_file()) if path is not None and path.is_file()]


def own_file() -> Path:
    """The user's own file, there or not."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "influence-launcher" / FILE_NAME


def _named_file(config: Path | None) -> Path | None:
    """The one file that the user names."""
    if config is None and os.environ.get(CONFIG_VARIABLE):
        return Path(os.environ[CONFIG_VARIABLE])
    return config


def _unasked_file(config: Path | None) -> Path | None:
    """The project's file, which is read because of the folder that a command is given in; None where the
    user names a file, or is in the folder of their own."""
    path = None if _named_file(config) else _project_file(Path.cwd())
    return None if path is None or path.resolve() == own_file().resolve() else path


def _project_file(folder: Path) -> Path | None:
    """The nearest file from a folder up to the top of its repository; outside of one, the folder's own."""
    above = [folder, *folder.parents]
    top = next((index for index, each in enumerate(above) if (each / ".git").exists()), 0)
    return next((each / FILE_NAME for each in above[: top + 1] if (each / FILE_NAME).is_file()), None)


def _find(name: str, clusters: Clusters | None) -> Profile:
    if clusters is not None and name in clusters.names:
        return clusters.profile(name)
    if name in IMPLICIT:
        return Profile(name=name, backend=name)
    known = [*(clusters.names if clusters else ()), *IMPLICIT]
    hint = did_you_mean(name, known)
    raise UsageError(
        f"no cluster '{name}'" + (f"; {hint}" if hint else ""),
        why=_there_are(clusters),
        next_step=f"describe it under clusters: in {clusters.source if clusters else FILE_NAME}",
    )


def _of_backend(backend: str, clusters: Clusters | None, *, offline: bool) -> Profile:
    found = clusters.of_backend(backend) if clusters else []
    if clusters is not None and len(found) == 1:
        return clusters.profile(found[0])
    if found:
        raise UsageError(
            f"--backend {backend}: several clusters are of that backend: {', '.join(found)}",
            next_step="choose one with --cluster",
        )
    if offline or backend in IMPLICIT:
        return Profile(name=backend, backend=backend)
    raise UsageError(
        f"--backend {backend}: no cluster of that backend is described",
        why=_there_are(clusters),
        next_step=f"write into {clusters.source if clusters else FILE_NAME}: "
        "clusters: {NAME: {backend: runai, runai: {url: https://..., project: ...}}}",
    )


def _options(name: str, config: Path | None, default: str | None) -> tuple[str, ...]:
    """The options that choose a profile again, as few as are sure to.

    Args:
        default: what the files choose; None where they were not read.
    """
    if name == LOCAL and config is not None:
        default = None  # without --config, other files choose
    words = () if name == (os.environ.get(CLUSTER_VARIABLE) or default) else ("--cluster", name)
    return words if config is None or name == LOCAL else (*words, "--config", str(config))


def _choice_of(backend: str, clusters: Clusters | None) -> str:
    """How to come by a cluster of a backend, in words."""
    found = clusters.of_backend(backend) if clusters else []
    if found:
        return f"choose a cluster of that backend: {' or '.join(f'--cluster {name}' for name in found)}"
    if backend == LOCAL:
        return f"choose this machine: --cluster {LOCAL}"
    file = clusters.source if clusters else FILE_NAME
    return f"describe a cluster with backend: {backend} in {file}, and choose it with --cluster"


def _there_are(clusters: Clusters | None) -> str:
    described = clusters.names if clusters else []
    contexts = [name for name in IMPLICIT if name not in (LOCAL, *described)]
    always = f"{LOCAL} is this machine"
    if contexts:
        always += f", {' and '.join(contexts)} the cluster of the kubeconfig's current context"
    if clusters is None or not described:
        return f"none is described; without that, {always}"
    return f"{clusters.source} describes {', '.join(described)}; without that, {always}"
