"""One layer of settings over another: ``--set`` as a layer, the merge, and what no layer may hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.errors import SpecError, UsageError
from launcher.secrets import is_secret_key, is_secret_value
from launcher.yaml_source import KeyPath, Place, YamlSource, parse_yaml


def parse_set(text: str) -> YamlSource:
    """``training.total_steps=3`` as a layer of one setting.

    Below ``verl`` the rest of the path is one key: ``verl.trainer.test_freq=5``.

    Raises:
        UsageError: no ``=``, or an empty part in the path.
        SpecError: the value is no YAML.
    """
    path_text, equals, value_text = text.partition("=")
    path: KeyPath = tuple(path_text.strip().split("."))
    if path[0] == "verl" and len(path) > 1:
        path = ("verl", ".".join(map(str, path[1:])))
    if not equals or not all(path):
        raise UsageError(
            f"--set {path_text.strip()}: expected path.to.setting=value",
            next_step="--set training.total_steps=3",
        )
    value = parse_yaml(value_text, source=f"--set {path_text.strip()}", flag=True)
    place = Place("--set")
    data: Any = value.data
    for part in reversed(path):
        data = {part: data}
    places = {path[:n]: place for n in range(len(path) + 1)}
    return YamlSource(data, places | {(*path, *below): place for below in value.places})


def merge(data: dict[str, Any], places: dict[KeyPath, Place], layer: YamlSource) -> None:
    """Lay ``layer`` over ``data``, in place, and remember where each value came from."""

    def lay(into: dict[str, Any], over: Mapping[str, Any], path: KeyPath) -> None:
        for key, value in over.items():
            here = (*path, key)
            if isinstance(value, dict) and isinstance(into.get(key), dict):
                places[here] = layer.places[here]
                lay(into[key], value, here)
                continue
            for old in [p for p in places if p[: len(here)] == here]:
                del places[old]
            places.update({p: place for p, place in layer.places.items() if p[: len(here)] == here})
            into[key] = _copied(value)

    lay(data, layer.data, ())


def refuse_secrets(layer: YamlSource) -> None:
    """SpecError where a value has the form of a secret, or a free-form key says that it is one."""
    for path, value in _leaves(layer.data, ()):
        if not isinstance(value, str) or not value:
            continue
        if is_secret_value(value) or (path[0] == "verl" and any(is_secret_key(str(key)) for key in path[1:])):
            raise SpecError(
                f"{layer.places[path].at(path)}: looks like a secret, and a spec is stored and shown",
                next_step="put it into the Secret that cluster.secret names, or into the environment",
            )


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _leaves(below, (*path, key))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _leaves(below, (*path, index))
    else:
        yield path, value


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(below) for key, below in value.items()}
    return [_copied(below) for below in value] if isinstance(value, list) else value
