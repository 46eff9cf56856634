from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from influence.rundir import RunPaths, RunSpec, create_run

JOBS = Path(__file__).parents[2] / "jobs"
Spec = dict[str, Any]


def _merge(below: Spec, above: Mapping[str, Any]) -> Spec:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(below.get(key), Mapping)
        merged[key] = _merge(below[key], value) if both else value
    return merged


def _preset(name: str) -> Spec:
    document = yaml.safe_load((JOBS / f"{name}.yaml").read_text())
    base = document.pop("extends", None)
    return _merge(_preset(base), document) if base else document


def resolve(preset: str, *overlays: str, **changes: Any) -> Spec:
    """A spec as run.json holds it; changes by dotted path, with ``__`` for the dot."""
    spec = _preset(preset)
    for overlay in overlays:
        spec = _merge(spec, yaml.safe_load((JOBS / "overlays" / f"{overlay}.yaml").read_text()))
    del spec["description"]
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = spec
        for section in sections:
            place = place[section]
        assert key in place or sections == ["verl"], f"no such setting: {path}"
        place[key] = value
    return {**spec, "preset": preset, "overlays": list(overlays), "code": {"version": "0.1.0"}}


@pytest.fixture(scope="session")
def _tiny_spec() -> Spec:
    return resolve("alltoken-timing", "tiny-cpu")


@pytest.fixture
def tiny_spec(_tiny_spec: Spec) -> Spec:
    return copy.deepcopy(_tiny_spec)


def run_document(name: str, spec: Spec) -> RunSpec:
    wandb = {**spec["wandb"], "run_id": name, "url": None}
    return RunSpec.new(name, spec, wandb=wandb)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunPaths]:
    def make(spec: Spec, name: str = "infl-test-0001") -> RunPaths:
        paths = RunPaths.of(tmp_path, name)
        create_run(paths, run_document(name, spec))
        return paths

    return make
