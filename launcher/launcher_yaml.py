"""``launcher.yaml``: the profiles of clusters, the project's file with the user's own laid over it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.errors import SpecError
from launcher.layers import merge, refuse_secrets
from launcher.model.clusters import OWN_KEYS, USERS_OWN, LauncherYaml, broken_cluster_rules
from launcher.model.rules import Problem
from launcher.model.validation import validate_launcher_yaml
from launcher.profiles import CONFIG_VARIABLE, DEFAULT_NAMESPACE, IMPLICIT, Profile, RunaiAccess, own_file
from launcher.suggest import did_you_mean
from launcher.yaml_source import KeyPath, Place, YamlSource, read_yaml, shown_path

_PATHS: tuple[tuple[str, ...], ...] = (("root",), ("kubeconfig",), ("runai", "ca_file"))
_MAX_PROBLEMS = 12
_REPAIR = "repair the file, or read another with --config FILE"


class Clusters:
    """What the files say; make one with `read_clusters`.

    A cluster is checked when its profile is asked for: one that is half written does not stand in the way of
    the others, nor of this machine.

    Attributes:
        default: the cluster that is meant where none is named; None where the files do not say. Whether there
            is such a cluster shows when its profile is asked for.
        source: the files, for messages.
    """

    def __init__(self, layers: Sequence[YamlSource], source: str, project: Path | None = None) -> None:
        """
        Args:
            project: as ``read_clusters`` has it.

        Raises:
            SpecError: something is wrong outside of the single clusters.
        """
        data: dict[str, Any] = {}
        places: dict[KeyPath, Place] = {(): Place(source)}
        for layer in layers:
            merge(data, places, layer)
        self._layers, self._data, self._places, self.source = layers, data, places, source
        self._project = project
        clusters = data.get("clusters")
        document = self._checked(data | ({"clusters": {}} if isinstance(clusters, dict) else {}))
        self.default: str | None = document.default_cluster
        self._profiles = _mapping(clusters)

    @property
    def names(self) -> list[str]:
        """Of all clusters, in the order of the files."""
        return list(self._profiles)

    @property
    def profiles(self) -> dict[str, Profile]:
        """Every cluster's; SpecError where one is wrong."""
        return {name: self.profile(name) for name in self.names}

    def of_backend(self, backend: str) -> list[str]:
        """The names of the clusters that say that they are of a backend, valid or not."""
        return [name for name, each in self._profiles.items() if _mapping(each).get("backend") == backend]

    def profile(self, name: str) -> Profile:
        """One cluster's, by its name.

        Raises:
            SpecError: anything wrong with it, with its line.
        """
        for layer in self._layers:
            _refuse_secrets(layer, name)
        if self._project is not None:
            problems = [*_users_own(name, self._profiles[name], self._places, shown_path(self._project))]
            if problems:
                raise self._error(problems)
        document = self._checked({"clusters": {name: self._profiles[name]}})
        problems = list(broken_cluster_rules(document))
        if problems:
            raise self._error(problems)
        return _profile(name, document, self._data, self._places)

    def require_default(self) -> None:
        """SpecError where ``default_cluster`` names none that there is."""
        known = [*self.names, *IMPLICIT]
        if self.default is not None and self.default not in known:
            what = f"no such cluster; {_near(self.default, known)}"
            raise self._error([Problem(("default_cluster",), what)])

    def _checked(self, data: dict[str, Any]) -> LauncherYaml:
        document, problems = validate_launcher_yaml(data)
        if document is None:
            raise self._error(problems)
        return document

    def _error(self, problems: Sequence[Problem]) -> SpecError:
        return _error(problems, self._places, self.source)


def read_clusters(files: Sequence[Path], project: Path | None = None) -> Clusters:
    """Merge, and check what is outside of the single clusters.

    Args:
        files: later wins, key by key.
        project: the one of them that nobody named: whoever wrote it must not choose programs that run here,
            nor where secrets of the user are sent.

    Raises:
        SpecError: a file cannot be read, is no YAML, or has keys that mean nothing.
    """
    source = " and ".join(shown_path(path) for path in files)
    return Clusters([_read(path) for path in files], source, project)


def _read(path: Path) -> YamlSource:
    try:
        source = read_yaml(path, source=shown_path(path))
    except SpecError as error:
        raise SpecError(error.what, why=error.why, next_step=error.next_step or _REPAIR) from error
    if source.data is None:
        return YamlSource({}, source.places)
    if not isinstance(source.data, dict):
        raise SpecError(
            f"{source.places[()]}: must be a mapping with default_cluster and clusters", next_step=_REPAIR
        )
    for profile in _mapping(source.data.get("clusters")).values():
        for key_path in _PATHS:
            _make_absolute(profile, key_path, path.parent)
    return source


def _make_absolute(profile: Any, path: tuple[str, ...], folder: Path) -> None:
    for part in path[:-1]:
        profile = _mapping(profile).get(part)
    value = _mapping(profile).get(path[-1])
    if isinstance(value, str) and value and "\0" not in value:
        with suppress(RuntimeError):  # ~somebody whom this machine does not know
            profile[path[-1]] = os.path.normpath(folder.absolute() / Path(value).expanduser())


def _refuse_secrets(layer: YamlSource, name: str) -> None:
    """As ``launcher.layers.refuse_secrets`` for one cluster, whose values are judged as a preset's are."""
    profile = _mapping(layer.data.get("clusters")).get(name)
    if isinstance(profile, dict):
        refuse_secrets(_part(profile, layer.places, ("clusters", name)))


def _part(data: dict[str, Any], places: Mapping[KeyPath, Place], above: KeyPath) -> YamlSource:
    """A mapping within a document as a document, whose places know where it stands."""
    below = {
        path[len(above) :]: replace(place, above=above)
        for path, place in places.items()
        if path[: len(above)] == above
    }
    return YamlSource(data, below)


def _profile(name: str, document: LauncherYaml, data: Any, places: Mapping[KeyPath, Place]) -> Profile:
    checked: Any = document.clusters[name]
    part = _part(data["clusters"][name], places, ("clusters", name))
    settings = {key: value for key, value in part.data.items() if key not in OWN_KEYS and value is not None}
    own_places = dict(part.places)
    runai = None
    if checked.runai is not None:
        fields = checked.runai.model_dump()
        ca_file = fields.pop("ca_file")
        runai = RunaiAccess(**fields, ca_file=None if ca_file is None else Path(ca_file))
        cluster = settings.setdefault("cluster", {})
        if "namespace" not in cluster:
            settings["cluster"] = {**cluster, "namespace": f"runai-{runai.project}"}
            own_places.setdefault(("cluster",), part.places[("runai",)])
            own_places[("cluster", "namespace")] = part.places[("runai", "project")]
    return Profile(
        name=name,
        backend=checked.backend,
        root=None if checked.root is None else Path(checked.root),
        kubeconfig=None if checked.kubeconfig is None else Path(checked.kubeconfig),
        context=checked.context,
        namespace=settings.get("cluster", {}).get("namespace", DEFAULT_NAMESPACE),
        runai=runai,
        settings=settings,
        places=own_places,
        source=str(part.places[()]),
    )


def _users_own(name: str, profile: Any, places: Mapping[KeyPath, Place], project: str) -> Iterator[Problem]:
    """What the project's file says of a cluster that only the user may say."""
    for key_path in USERS_OWN:
        path, value = ("clusters", name, *key_path), profile
        for part in key_path:
            value = _mapping(value).get(part)
        if value is not None and places[path].source == project:
            yield Problem(
                path,
                "a project's file may not say this, since it would choose what runs here or where your "
                f"secrets go; write it into {own_file()}, or name this file with --config or "
                f"{CONFIG_VARIABLE}",
            )


def _error(problems: Sequence[Problem], places: Mapping[KeyPath, Place], source: str) -> SpecError:
    lines = []
    for problem in problems[:_MAX_PROBLEMS]:
        # pydantic names the key of a mapping in brackets
        path = tuple(part for part in problem.path if part != "[key]")
        enclosing = (path[:length] for length in range(len(path), -1, -1))
        place = next((places[above] for above in enclosing if above in places), Place(source))
        lines.append(f"{place.at(path)}: {problem.what}")
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"... and {len(problems) - _MAX_PROBLEMS} more")
    return SpecError("\n".join(lines), next_step=_REPAIR)


def _near(name: str, known: Sequence[str]) -> str:
    return did_you_mean(name, known) or f"there are {', '.join(known)}"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
