"""``launcher.yaml``: the profiles of clusters, the project's file with the user's own laid over it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True)
class Clusters:
    """What the files say.

    Attributes:
        default: the cluster that is meant where none is named; None where the files do not say.
        profiles: by name.
        source: the files, for messages.
    """

    default: str | None
    profiles: Mapping[str, Profile]
    source: str


def read_clusters(files: Sequence[Path], project: Path | None = None) -> Clusters:
    """Merge and check.

    Args:
        files: later wins, key by key.
        project: the one of them that nobody named: whoever wrote it must not choose programs that run here,
            nor where secrets of the user are sent.

    Raises:
        SpecError: anything wrong in a file, with its line.
    """
    source = " and ".join(shown_path(path) for path in files)
    data: dict[str, Any] = {}
    places: dict[KeyPath, Place] = {(): Place(source)}
    for path in files:
        layer = _read(path)
        _refuse_secrets(layer)
        merge(data, places, layer)
    document, problems = validate_launcher_yaml(data)
    if project is not None:
        problems = [*problems, *_users_own(data, places, shown_path(project))]
    if document is not None:
        problems = [*problems, *broken_cluster_rules(document), *_default_problem(document)]
    if document is None or problems:
        raise _error(problems, places, source)
    profiles = {name: _profile(name, document, data, places) for name in document.clusters}
    return Clusters(document.default_cluster, profiles, source)


def _read(path: Path) -> YamlSource:
    source = read_yaml(path, source=shown_path(path))
    if source.data is None:
        return YamlSource({}, source.places)
    if not isinstance(source.data, dict):
        raise SpecError(f"{source.places[()]}: must be a mapping with default_cluster and clusters")
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


def _refuse_secrets(layer: YamlSource) -> None:
    """Each cluster on its own, so that a section's values are judged as a preset's are."""
    for name, profile in _mapping(layer.data.get("clusters")).items():
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


def _users_own(data: dict[str, Any], places: Mapping[KeyPath, Place], project: str) -> Iterator[Problem]:
    """What the project's file says that only the user may say."""
    for name, profile in _mapping(data.get("clusters")).items():
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


def _default_problem(document: LauncherYaml) -> list[Problem]:
    name, known = document.default_cluster, [*document.clusters, *IMPLICIT]
    if name is None or name in known:
        return []
    return [Problem(("default_cluster",), f"no such cluster; {_near(name, known)}")]


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
    return SpecError("\n".join(lines), next_step="repair the file, or read another with --config FILE")


def _near(name: str, known: Sequence[str]) -> str:
    return did_you_mean(name, known) or f"there are {', '.join(known)}"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
