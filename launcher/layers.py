"""One layer of settings over another: ``--set`` as a layer, the merge, and what no layer may hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from launcher.errors import SpecError, UsageError
from launcher.secrets import is_secret_key, is_secret_value
from launcher.yaml_source import MAX_DEPTH, KeyPath, Place, YamlSource, parse_yaml


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
    if not equals or not all(path) or len(path) > MAX_DEPTH:
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
            if key in into:
                for old in all_paths(into[key], here):
                    del places[old]
            places.update((new, layer.places[new]) for new in all_paths(value, here))
            into[key] = _copied(value)

    lay(data, layer.data, ())


def refuse_secrets(layer: YamlSource) -> None:
    """SpecError where a value holds what looks like a secret, a free-form key says that it is one, or verl
    would put something of its environment in the value's place."""
    for path, value in _leaves(layer.data, ()):
        place = layer.places[path]
        if any(isinstance(key, str) and is_secret_value(key) for key in path):
            raise _secret(str(place))  # the path would show it
        # An image without a registry's name, too, may have a commit for its tag.
        text = f"/{value}" if path == ("cluster", "image") else value
        named_so = path[:1] == ("verl",) and any(is_secret_key(str(key)) for key in path[1:])
        if (isinstance(text, str) and is_secret_value(text)) or (
            named_so and value not in (None, "") and not isinstance(value, bool)
        ):
            raise _secret(place.at(path))
        if isinstance(value, str) and _may_resolve(value):
            raise SpecError(
                f"{place.at(path)}: a resolver such as ${{oc.env:NAME}} is not allowed",
                why="verl would put in a value from its environment, which may be a secret, and print it",
                next_step="write the value itself",
            )


def _may_resolve(text: str) -> bool:
    # OmegaConf's ${name:argument}; a name may itself be interpolated: anything may stand before the colon.
    start = text.find("${")
    return start >= 0 and ":" in text[start:]


def _secret(where: str) -> SpecError:
    return SpecError(
        f"{where}: looks like a secret, and a spec is stored and shown",
        next_step="put it into the Secret that cluster.secret names, or into the environment",
    )


def all_paths(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """The path of a value and of all below it."""
    yield path
    if isinstance(value, (dict, list)):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from all_paths(below, (*path, key))


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
