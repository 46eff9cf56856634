"""Presets: ``jobs/<name>.yaml`` with ``extends:`` chains, overlays and ``--set``, merged and checked.

Later wins: the chain from its root to the preset, then the overlays in order, then what the cluster's profile
sets, then the ``--set`` in order.
Mappings merge key by key; lists and single values are replaced whole. Every value remembers the line it came
from, so that an error about the merged whole still names a file and a line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import SpecError, UsageError
from launcher.layers import merge, parse_set, refuse_secrets
from launcher.resources import shipped_jobs_dir
from launcher.suggest import did_you_mean
from launcher.yaml_source import KeyPath, Place, YamlSource, dotted, read_yaml, shown_path

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
MAX_PROBLEMS = 12
_ABOUT = ("extends", "description")  # keys of a file that are no settings


@dataclass(frozen=True, slots=True)
class PresetFile:
    """One preset or overlay on disk."""

    name: str
    path: Path

    @property
    def label(self) -> str:
        """The path as errors show it: relative to the current folder where it lies inside."""
        return shown_path(self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A preset after ``extends``, overlays and ``--set``, complete and checked.

    Attributes:
        preset: its name (a file's stem, where a file was given).
        overlays: their names, in order.
        settings: the sections of ``jobs/base.yaml``; plain data in the schema's types.
    """

    preset: str
    overlays: tuple[str, ...]
    settings: dict[str, Any]


class PresetLibrary:
    """Folders of presets, searched in order: the user's own, then the shipped one.

    A preset that extends its own name extends the next one of that name in the search order: a site's
    ``base.yaml`` with ``extends: base`` changes the defaults of every shipped preset.
    """

    def __init__(self, jobs_dirs: Sequence[Path] = ()) -> None:
        """
        Args:
            jobs_dirs: folders like ``jobs/``, searched before the shipped one.

        Raises:
            UsageError: one of them is no folder.
        """
        for folder in jobs_dirs:
            if not folder.is_dir():
                raise UsageError(
                    f"no such folder of presets: {folder}", next_step="check --jobs and INFL_JOBS"
                )
        self._dirs = (*jobs_dirs, shipped_jobs_dir())

    def presets(self) -> list[PresetFile]:
        """Every preset by name; of equal names the first found."""
        return self._listed("")

    def overlays(self) -> list[PresetFile]:
        """Every overlay by name; of equal names the first found."""
        return self._listed("overlays")

    def find_preset(self, name: str) -> PresetFile:
        """A preset by name or path; UsageError where there is none."""
        return self._find(name, "preset", "", self.presets)

    def find_overlay(self, name: str) -> PresetFile:
        """An overlay by name or path; UsageError where there is none."""
        return self._find(name, "overlay", "overlays", self.overlays)

    def resolve(
        self,
        preset: str,
        overlays: Sequence[str] = (),
        sets: Sequence[str] = (),
        *,
        site: YamlSource | None = None,
    ) -> Resolved:
        """Merge and check.

        Args:
            preset: a name, or the path of a YAML file.
            overlays: names or paths; later wins.
            sets: ``path.to.setting=value`` with the value in YAML; later wins.
            site: what a cluster's profile sets, laid between the overlays and ``sets``.

        Raises:
            UsageError: an unknown preset or overlay, an overlay given twice, a ``--set`` without ``=``.
            SpecError: anything wrong in a file or a value, each with its place.
        """
        found = self.find_preset(preset)
        layers = [_without_about(source) for source in self._chain(found)]
        names = []
        for overlay in overlays:
            file = self.find_overlay(overlay)
            if file.name in names:
                raise UsageError(f"--overlay {overlay} is given twice")
            names.append(file.name)
            source = read_preset(file)
            if "extends" in source.data:
                raise SpecError(
                    f"{source.places[('extends',)]}: extends: an overlay cannot extend",
                    next_step="give several --overlay, later ones win",
                )
            layers.append(_without_about(source))
        if site is not None:
            layers.append(site)
        layers += [parse_set(text) for text in sets]

        data: dict[str, Any] = {}
        places: dict[KeyPath, Place] = {(): Place(found.label)}
        ranks: dict[str, int] = {}
        for rank, layer in enumerate(layers):
            refuse_secrets(layer)
            merge(data, places, layer)
            ranks |= {place.source: rank for place in layer.places.values()}
        settings = _checked(data, places, found, ranks)
        return Resolved(preset=found.name, overlays=tuple(names), settings=settings)

    def describe(self, file: PresetFile) -> str:
        """The file's own ``description``, or an empty text."""
        text = read_preset(file).data.get("description")
        return text if isinstance(text, str) else ""

    def _chain(self, file: PresetFile) -> list[YamlSource]:
        """The files from the root of the ``extends:`` chain to ``file``."""
        chain: list[tuple[PresetFile, YamlSource]] = []
        while True:
            source = read_preset(file)
            chain.append((file, source))
            parent = source.data.get("extends")
            if parent is None:
                return [layer for _, layer in reversed(chain)]
            place = source.places[("extends",)]
            file = self._parent(parent, file, place)
            if any(file.path.samefile(seen.path) for seen, _ in chain):
                circle = " -> ".join([*(seen.name for seen, _ in chain), file.name])
                raise SpecError(f"{place}: extends: a circle: {circle}", next_step="end one of them at base")

    def _parent(self, name: Any, child: PresetFile, place: Place) -> PresetFile:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise SpecError(f"{place}: extends: must be the name of a preset, not {name!r}")
        own_dir = child.path.parent
        dirs = self._dirs if any(_same(own_dir, d) for d in self._dirs) else (own_dir, *self._dirs)
        if name == child.name:
            dirs = dirs[1 + next(i for i, d in enumerate(dirs) if _same(own_dir, d)) :]
        for folder in dirs:
            if (folder / f"{name}.yaml").is_file():
                return PresetFile(name, folder / f"{name}.yaml")
        known = sorted({f.name for f in self.presets()} - {child.name})
        raise SpecError(f"{place}: extends: no preset '{name}'{_near(name, known)}", why=_there_are(known))

    def _find(self, name: str, kind: str, subdir: str, listed: Callable[[], list[PresetFile]]) -> PresetFile:
        if "/" in name or name.endswith((".yaml", ".yml")):
            path = Path(name)
            if not _is_file(path):
                raise UsageError(f"--{kind} {name}: no such file", next_step="launcher presets list")
            if not NAME.fullmatch(path.stem):
                raise UsageError(
                    f"--{kind} {name}: the file's name becomes part of the run's name",
                    why="so it must be of lower-case letters, digits and '-'",
                    next_step=f"rename it, for example to {_slug(path.stem)}.yaml",
                )
            return PresetFile(path.stem, path)
        if NAME.fullmatch(name):
            for folder in self._dirs:
                path = folder / subdir / f"{name}.yaml"
                if path.is_file():
                    return PresetFile(name, path)
        known = [file.name for file in listed()]
        raise UsageError(
            f"no {kind} '{name}'{_near(name, known)}",
            why=_there_are(known),
            next_step="launcher presets list",
        )

    def _listed(self, subdir: str) -> list[PresetFile]:
        found: dict[str, PresetFile] = {}
        for folder in self._dirs:
            for path in (folder / subdir).glob("*.yaml"):
                if NAME.fullmatch(path.stem):
                    found.setdefault(path.stem, PresetFile(path.stem, path))
        return [found[name] for name in sorted(found)]


def read_preset(file: PresetFile) -> YamlSource:
    """A preset's or overlay's own file, unmerged; SpecError where it is no mapping of settings."""
    source = read_yaml(file.path, source=file.label)
    if source.data is None:
        return YamlSource({}, source.places)
    if not isinstance(source.data, dict):
        raise SpecError(f"{source.places[()]}: must be a mapping of settings")
    description = source.data.get("description")
    if description is not None and not isinstance(description, str):
        raise SpecError(f"{source.places[('description',)].at(('description',))}: must be text")
    return source


def _checked(
    data: dict[str, Any], places: Mapping[KeyPath, Place], preset: PresetFile, ranks: Mapping[str, int]
) -> dict[str, Any]:
    """
    Args:
        ranks: by the source of a place, where its layer lies; the highest on top.
    """
    from launcher.model import validate

    settings, problems = validate(data)
    if not problems:
        return settings
    lines = []
    of_site: Place | None = None
    for problem in problems[:MAX_PROBLEMS]:
        place = places.get(problem.path) or _nearest(places, problem.path, preset)
        line = f"{place.at(problem.path)}: {problem.what}"
        since = None if problem.since is None else places.get(problem.since)
        if since is not None and ranks.get(since.source, 0) > ranks.get(place.source, 0):
            # The default was right before this layer came.
            place = since
            line = f"{place.at(problem.since or ())}: {dotted(problem.path)} {problem.what}"
        of_site = of_site or (place if place.above else None)
        lines.append(line)
    if len(problems) > MAX_PROBLEMS:
        lines.append(f"... and {len(problems) - MAX_PROBLEMS} more")
    next_step = "launcher presets show base"
    if any(problem.what == "missing" for problem in problems):
        next_step = f"add `extends: base` to {preset.label}"
    elif of_site is not None:
        next_step = f"repair {dotted(of_site.above)} in {of_site.source}; `{next_step}` has every setting"
    raise SpecError("\n".join(lines), next_step=next_step)


def _nearest(places: Mapping[KeyPath, Place], path: KeyPath, preset: PresetFile) -> Place:
    """The place of what encloses a setting that stands nowhere."""
    for length in range(len(path) - 1, 0, -1):
        if path[:length] in places:
            return places[path[:length]]
    return Place(preset.label, 1)


def _without_about(source: YamlSource) -> YamlSource:
    return YamlSource({k: v for k, v in source.data.items() if k not in _ABOUT}, source.places)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than any file's
        return False


def _same(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve()


def _near(name: str, known: Sequence[str]) -> str:
    hint = did_you_mean(name, known)
    return f"; {hint}" if hint else ""


def _there_are(known: Sequence[str]) -> str:
    return f"there are {', '.join(known)}" if known else "there are none"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "preset"
