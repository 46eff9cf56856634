"""Presets: search, chains, overlays, ``--set``, the merge, and errors that name their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influence.config import TracerConfig
from launcher.errors import LauncherError, SpecError, UsageError
from launcher.group import run
from launcher.layers import merge, parse_set
from launcher.presets import PresetLibrary
from launcher.resources import shipped_jobs_dir
from launcher.yaml_source import Place, YamlSource, dump_yaml, parse_yaml, read_yaml


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    (tmp_path / "jobs" / "overlays").mkdir(parents=True)
    return tmp_path / "jobs"


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name.replace('_', '-')}.yaml").write_text(text)


def error_of(
    library: PresetLibrary, *args: Any, kind: type[LauncherError] = SpecError, **kwargs: Any
) -> LauncherError:
    with pytest.raises(kind) as caught:
        library.resolve(*args, **kwargs)
    return caught.value


# --- the shipped presets


@pytest.mark.parametrize("overlays", [(), ("tiny-cpu",), ("tiny-gpu",)])
@pytest.mark.parametrize("name", [file.name for file in PresetLibrary().presets()])
def test_every_shipped_preset_resolves_and_describes_itself(name: str, overlays: tuple[str, ...]) -> None:
    library = PresetLibrary()
    resolved = library.resolve(name, overlays)
    assert (resolved.preset, resolved.overlays) == (name, overlays)
    assert len(library.describe(library.find_preset(name))) > 20
    assert json.loads(json.dumps(resolved.settings)) == resolved.settings


def test_alltoken_timing_carries_the_reference_runs_settings() -> None:
    resolved = PresetLibrary().resolve("alltoken-timing").settings
    assert resolved["hardware"]["ranks_per_node"] == 8
    assert resolved["hardware"]["gpu_product"] == "NVIDIA-H200"
    assert "Qwen2.5-1.5B" in resolved["model"]["path"]
    assert resolved["training"]["responses_per_prompt"] == 16
    assert resolved["training"]["prompts_per_step"] == 8 * 6
    assert resolved["training"]["total_steps"] == 2
    assert resolved["influence"] == {
        "objective": "log_prob_advantage",
        "contrast": "accepted_minus_rejected",
        "accepted_above": 0.0,
        "scope": "per_prompt",
        "hessian": "inverse",
        "damping": 0.1,
        "damping_mode": "trace_over_dim",
        "exclude_self": False,
        "positions": "response",
        "projection_dim_factor": 256,
        "max_hessian_dim": 2500,
        "max_tokens_per_response": -1,
        "modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "capture": "auto",
        "profile_timing": True,
        "seed": 0,
    }


def test_alltoken_timing_is_the_named_configuration_of_the_reference_run() -> None:
    section = PresetLibrary().resolve("alltoken-timing").settings["influence"]
    assert TracerConfig.from_mapping(section) == TracerConfig.reference_run()


def test_capped512_differs_from_alltoken_in_one_setting() -> None:
    library = PresetLibrary()
    alltoken, capped = (
        library.resolve("alltoken-timing").settings,
        library.resolve("capped512-timing").settings,
    )
    assert capped["influence"].pop("max_tokens_per_response") == 512
    assert alltoken["influence"].pop("max_tokens_per_response") == -1
    assert capped == alltoken


@pytest.mark.parametrize("overlay", ["tiny-cpu", "tiny-gpu"])
def test_a_tiny_overlay_keeps_the_tracing(overlay: str) -> None:
    library = PresetLibrary()
    for name in ("alltoken-timing", "capped512-timing", "smoke"):
        plain, tiny = library.resolve(name).settings, library.resolve(name, [overlay]).settings
        assert tiny["influence"] == plain["influence"]
        assert tiny["store"] == plain["store"]
        assert tiny["training"]["total_steps"] == plain["training"]["total_steps"]


# --- where presets are found


def test_own_folders_come_before_the_shipped_one(jobs: Path) -> None:
    write(jobs, smoke="extends: base\ntraining: {seed: 7}\n", mine="extends: smoke\n")
    (jobs / "overlays" / "site.yaml").write_text("cluster: {namespace: lab}\n")
    library = PresetLibrary([jobs])
    assert library.resolve("mine").settings["training"]["seed"] == 7
    assert library.resolve("smoke", ["site"]).settings["cluster"]["namespace"] == "lab"
    assert {f.name for f in library.presets()} >= {"mine", "smoke", "alltoken-timing"}
    assert library.find_preset("smoke").path.parent == jobs
    assert [f.name for f in library.overlays()] == ["site", "tiny-cpu", "tiny-gpu"]


def test_a_sites_base_changes_the_defaults_of_shipped_presets(jobs: Path) -> None:
    write(jobs, base="extends: base\ncluster: {namespace: lab, image: registry.example.com/infl:2}\n")
    library = PresetLibrary([jobs])
    cluster = library.resolve("capped512-timing").settings["cluster"]
    assert (cluster["namespace"], cluster["image"]) == ("lab", "registry.example.com/infl:2")
    assert cluster["claim"] == PresetLibrary().resolve("base").settings["cluster"]["claim"]


def test_a_file_is_a_preset_or_an_overlay_and_extends_its_neighbours_first(tmp_path: Path) -> None:
    write(
        tmp_path,
        parent="extends: smoke\ntraining: {seed: 1}\n",
        child="extends: parent\n",
        over="training: {seed: 2}\n",
    )
    resolved = PresetLibrary().resolve(str(tmp_path / "child.yaml"))
    assert (resolved.preset, resolved.settings["training"]["seed"]) == ("child", 1)
    resolved = PresetLibrary().resolve(str(tmp_path / "child.yaml"), [str(tmp_path / "over.yaml")])
    assert (resolved.overlays, resolved.settings["training"]["seed"]) == (("over",), 2)


def test_unknown_names_list_what_there_is_with_near_matches() -> None:
    library = PresetLibrary()
    error = error_of(library, "alltoken-timng", kind=UsageError)
    assert error.what == "no preset 'alltoken-timng'; did you mean alltoken-timing or alltoken-2node?"
    assert error.why == "there are alltoken-2node, alltoken-timing, base, capped512-timing, smoke"
    assert "did you mean alltoken-2node" in error_of(library, "alltoken", kind=UsageError).what
    error = error_of(library, "smoke", ["tinycpu"], kind=UsageError)
    assert error.what == "no overlay 'tinycpu'; did you mean tiny-cpu or tiny-gpu?"
    for hostile in ("../secrets", "x/../../y", "a\nb", "", "A B"):
        assert error_of(library, hostile, kind=UsageError).exit_code == 2
    assert error_of(library, "smoke", ["tiny-cpu", "tiny-cpu"], kind=UsageError).what.endswith("given twice")


def test_a_file_whose_name_cannot_name_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "My Preset.yaml").write_text("extends: smoke\n")
    error = error_of(PresetLibrary(), str(tmp_path / "My Preset.yaml"), kind=UsageError)
    assert "my-preset.yaml" in str(error.next_step)


def test_a_missing_folder_of_presets_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder of presets"):
        PresetLibrary([tmp_path / "none"])


# --- chains


def test_circles_are_told_as_such(jobs: Path) -> None:
    write(jobs, a="extends: b\n", b="extends: c\n", c="# comment\nextends: a\n", own="extends: own\n")
    library = PresetLibrary([jobs])
    error = error_of(library, "a")
    assert error.what == f"{jobs / 'c.yaml'}:2: extends: a circle: a -> b -> c -> a"
    assert "no preset 'own'" in error_of(library, "own").what


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("extends: nothing\n", "m.yaml:1: extends: no preset 'nothing'"),
        ("extends: smok\n", "did you mean smoke?"),
        ("extends: ../smoke\n", "m.yaml:1: extends: must be the name of a preset, not '../smoke'"),
        ("extends: [base]\n", "m.yaml:1: extends: must be the name of a preset"),
        ("- extends\n", "m.yaml:1: must be a mapping of settings"),
        ("extends: base\ndescription: [x]\n", "m.yaml:2: description: must be text"),
        ("extends: base\ntraining: 3\n", "m.yaml:2: training: must be a mapping of settings, not 3"),
        ("extends: base\ntraining:\n", "m.yaml:2: training: must be a mapping of settings, not null"),
        (
            "extends: base\n\ntraining:\n  seed: 1\n  total_stps: 1\n",
            "m.yaml:5: training.total_stps: no such setting; did you mean total_steps?",
        ),
        ("extends: base\ntrainig: {}\n", "m.yaml:2: trainig: no such setting; did you mean training?"),
        (
            "extends: base\ntraining:\n  total_steps: three\n",
            "m.yaml:3: training.total_steps: must be a whole number, not the text 'three'",
        ),
        (
            "extends: base\nstore:\n  columns:\n    - token_ids\n    - logprobs\n",
            "m.yaml:5: store.columns[1]: must be token_ids or log_probs",
        ),
        (
            "extends: base\ntraining: {seed: 1, seed: 2}\n",
            "m.yaml:2: training.seed: written twice, first in line 2",
        ),
        ("extends: base\ntraining: &t {seed: 1}\n", "m.yaml:2: anchors"),
    ],
)
def test_errors_in_a_file_name_file_line_and_setting(jobs: Path, text: str, what: str) -> None:
    write(jobs, m=text)
    error = error_of(PresetLibrary([jobs]), "m")
    assert what in error.what
    assert error.exit_code == 3


def test_a_mistake_in_a_parent_names_the_parents_line(jobs: Path) -> None:
    write(
        jobs,
        parent="extends: base\n\ntraining: {seed: -1}\n",
        child="extends: parent\ntraining: {total_steps: 3}\n",
    )
    assert (
        error_of(PresetLibrary([jobs]), "child").what
        == f"{jobs / 'parent.yaml'}:3: training.seed: must be at least 0, not -1"
    )


def test_an_incomplete_preset_says_what_is_missing_and_what_to_extend(jobs: Path) -> None:
    write(jobs, m="model: {source: hub}\n")
    error = error_of(PresetLibrary([jobs]), "m")
    lines = error.what.splitlines()
    assert f"{jobs / 'm.yaml'}:1: model.path: missing" in lines
    assert f"{jobs / 'm.yaml'}:1: data: missing" in lines
    assert lines[-1].startswith("... and ")
    assert error.next_step == f"add `extends: base` to {jobs / 'm.yaml'}"


def test_several_mistakes_are_told_at_once_each_with_its_own_place(jobs: Path) -> None:
    write(jobs, m="extends: base\ntraining: {seed: x}\n")
    (jobs / "overlays" / "o.yaml").write_text("rollout:\n  name: sglang\n")
    error = error_of(PresetLibrary([jobs]), "m", ["o"], ["wandb.mode=on"])
    assert set(error.what.splitlines()) == {
        f"{jobs / 'm.yaml'}:2: training.seed: must be a whole number, not the text 'x'",
        f"{jobs / 'overlays' / 'o.yaml'}:2: rollout.name: must be vllm or hf_cpu, not the text 'sglang'",
        "--set wandb.mode: must be online or offline or disabled, not the text 'on'; did you mean online?",
    }


def test_an_overlay_extends_nothing(jobs: Path) -> None:
    (jobs / "overlays" / "o.yaml").write_text("training: {seed: 1}\nextends: base\n")
    assert (
        "o.yaml:2: extends: an overlay cannot extend" in error_of(PresetLibrary([jobs]), "smoke", ["o"]).what
    )


def test_files_inside_the_current_folder_are_named_relative_to_it(
    jobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(jobs, m="extends: base\ntraining: {seed: x}\n")
    monkeypatch.chdir(jobs.parent)
    assert error_of(PresetLibrary([jobs]), "m").what.startswith("jobs/m.yaml:2: training.seed")


# --- overlays and --set


def test_later_overlays_and_later_sets_win(jobs: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        (jobs / "overlays" / f"{name}.yaml").write_text(f"training: {{seed: {seed}}}\n")
    library = PresetLibrary([jobs])

    def seed_of(overlays: list[str], sets: list[str]) -> int:
        seed: int = library.resolve("smoke", overlays, sets).settings["training"]["seed"]
        return seed

    assert seed_of(["one", "two"], []) == 2
    assert seed_of(["two", "one"], []) == 1
    assert seed_of(["two"], ["training.seed=3", "training.seed=4"]) == 4


@pytest.mark.parametrize(
    ("text", "section", "expected"),
    [
        ("training.learning_rate=1e-5", "training", {"learning_rate": 1e-5}),
        ("data.train_files=[a.parquet, b.parquet]", "data", {"train_files": ["a.parquet", "b.parquet"]}),
        ("model.path=a=b", "model", {"path": "a=b"}),
        ("wandb.entity=", "wandb", {"entity": None}),
        ("wandb.entity='12'", "wandb", {"entity": "12"}),
        (
            "cluster.image=registry.example.com:5000/x:1",
            "cluster",
            {"image": "registry.example.com:5000/x:1"},
        ),
        ("training={seed: 9}", "training", {"seed": 9}),
        (
            "data.reward_function={path: /r.py, name: f}",
            "data",
            {"reward_function": {"path": "/r.py", "name": "f"}},
        ),
        (
            "verl.actor_rollout_ref.actor.optim.lr_warmup_steps=10",
            "verl",
            {"actor_rollout_ref.actor.optim.lr_warmup_steps": 10},
        ),
        ("verl.+trainer.x=[1, a]", "verl", {"+trainer.x": [1, "a"]}),
    ],
)
def test_set_takes_yaml_values(text: str, section: str, expected: dict[str, Any]) -> None:
    resolved = PresetLibrary().resolve("smoke", sets=[text]).settings
    plain = PresetLibrary().resolve("smoke").settings
    assert resolved == {**plain, section: {**plain[section], **expected}}


@pytest.mark.parametrize(
    ("text", "kind", "what"),
    [
        ("training.seed", UsageError, "--set training.seed: expected path.to.setting=value"),
        ("=1", UsageError, "--set : expected path.to.setting=value"),
        ("a..b=1", UsageError, "--set a..b: expected"),
        ("training.sed=1", SpecError, "--set training.sed: no such setting; did you mean seed?"),
        ("training.seed.x=1", SpecError, "--set training.seed: must be a whole number, not a mapping"),
        ("training=1", SpecError, "--set training: must be a mapping of settings, not 1"),
        ("extends=base", SpecError, "--set extends: no such setting"),
        ("wandb.entity=12", SpecError, "--set wandb.entity: must be text, not 12"),
        ("model.path=[1", SpecError, "--set model.path: not valid YAML"),
        ("model.path=*x", SpecError, "--set model.path: anchors (&) and aliases (*) are not allowed"),
        ("model.path=!!python/name:os.system x", SpecError, "--set model.path: the tag"),
        ("store.columns=[token_ids, x]", SpecError, "--set store.columns[1]: must be token_ids"),
        ("training.mini_batch_prompts=3", SpecError, "--set training.mini_batch_prompts: must divide"),
    ],
)
def test_a_wrong_set_names_the_flag(text: str, kind: type[LauncherError], what: str) -> None:
    assert error_of(PresetLibrary(), "smoke", sets=[text], kind=kind).what.startswith(what)


SETTABLE = [
    ("training.total_steps", st.integers(1, 9)),
    ("training.learning_rate", st.floats(0, 1)),
    ("model.path", st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1)),
    (
        "data.reward_function",
        st.none()
        | st.fixed_dictionaries(
            {"path": st.text(st.characters(categories=("L",)), min_size=1), "name": st.just("f")}
        ),
    ),
    (
        "wandb.entity",
        st.none() | st.text(st.characters(categories=("L", "N", "Zs")), min_size=1, max_size=128),
    ),
    ("data.val_files", st.lists(st.text(st.characters(categories=("L", "N")), min_size=1), max_size=3)),
    # A number of more than 30 digits is refused, wherever it stands.
    ("verl.trainer.test_freq", st.integers(-(10**29), 10**29) | st.booleans() | st.none()),
]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_set_equals_the_same_lines_in_an_overlay(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    chosen = data.draw(
        st.lists(st.sampled_from(SETTABLE), min_size=1, max_size=3, unique_by=lambda entry: entry[0])
    )
    sets, document = [], dict[str, dict[str, Any]]()
    for path, values in chosen:
        value = data.draw(values)
        section, _, key = path.partition(".")
        # A text as the presets' own writer quotes it (in a list, so on one line), anything else as JSON.
        written = dump_yaml([value])[1:-2] if isinstance(value, str) else json.dumps(value)
        sets.append(f"{path}={written}")
        document.setdefault(section, {})[key] = value
    overlay = tmp_path_factory.mktemp("overlay") / "edited.yaml"
    overlay.write_text(dump_yaml(document))
    library = PresetLibrary()
    by_flag, by_file = library.resolve("smoke", sets=sets), library.resolve("smoke", [str(overlay)])
    assert by_flag.settings == by_file.settings


# --- the merge

KEYS = st.sampled_from(["a", "b", "c"])


def layered(depth: int) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings that agree on which keys hold mappings (``m*``), as presets of one schema do."""
    values: st.SearchStrategy[Any] = st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2) | st.none()
    fields = st.dictionaries(KEYS, values, max_size=3)
    if not depth:
        return fields
    below = st.dictionaries(KEYS.map(lambda key: f"m{key}"), layered(depth - 1), max_size=2)
    return st.builds(lambda a, b: {**a, **b}, fields, below)


def merged(*layers: dict[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    places: dict[Any, Place] = {}
    for number, layer in enumerate(layers):
        merge(data, places, parse_yaml(dump_yaml(layer), source=f"layer-{number}"))
    assert set(places) >= set(all_paths(data, ()))
    return data


def all_paths(value: Any, path: tuple[str | int, ...]) -> list[tuple[str | int, ...]]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [*([path] if path else []), *(p for key, v in below for p in all_paths(v, (*path, key)))]


@settings(max_examples=80, deadline=None)
@given(layered(2), layered(2), layered(2))
def test_merging_layers_is_associative_with_the_empty_layer_as_identity(a: Any, b: Any, c: Any) -> None:
    assert merged(merged(a, b), c) == merged(a, merged(b, c)) == merged(a, b, c)
    assert merged(a, {}) == a == merged({}, a)
    assert merged(a, b, b) == merged(a, b)


@settings(max_examples=80, deadline=None)
@given(layered(2), layered(2))
def test_the_merge_takes_each_leaf_from_the_last_layer_that_has_it(a: Any, b: Any) -> None:
    def leaf(data: Any, path: tuple[str | int, ...]) -> Any:
        for part in path:
            if not isinstance(data, dict) or part not in data:
                return KeyError
            data = data[part]
        return data

    result = merged(a, b)
    for path in [p for p in all_paths(result, ()) if not any(isinstance(part, int) for part in p)]:
        value, newer, older = leaf(result, path), leaf(b, path), leaf(a, path)
        if not isinstance(value, dict):
            assert value == (older if newer is KeyError else newer)


def test_the_merge_leaves_its_layers_alone() -> None:
    layer = parse_yaml("a: {b: [1]}", source="x")
    data: dict[str, Any] = {}
    merge(data, {}, layer)
    data["a"]["b"].append(2)
    merge(data, {}, parse_set("a.c=3"))
    assert layer.data == {"a": {"b": [1]}}


def test_a_replaced_list_forgets_the_places_of_the_old_one() -> None:
    data: dict[str, Any] = {}
    places: dict[Any, Place] = {}
    merge(data, places, parse_yaml("a: [1, 2, 3]", source="old"))
    merge(data, places, YamlSource({"a": [4]}, {("a",): Place("new", 1), ("a", 0): Place("new", 1)}))
    assert {str(path): str(place) for path, place in places.items()} == {
        "('a',)": "new:1",
        "('a', 0)": "new:1",
    }


def test_base_names_every_setting_on_a_line_of_its_own_or_in_a_list() -> None:
    source = read_yaml(shipped_jobs_dir() / "base.yaml", source="base.yaml")
    lines = [place.line for path, place in source.places.items() if len(path) == 2 and path[0] != "verl"]
    assert len(lines) == len(set(lines))


# --- large files


class CountedPlaces(dict[Any, Place]):
    """Counts how many of its paths are looked through."""

    num_seen = 0

    def __iter__(self) -> Any:
        for path in super().__iter__():
            self.num_seen += 1
            yield path

    def items(self) -> Any:
        for item in super().items():
            self.num_seen += 1
            yield item


def test_the_work_of_a_merge_grows_with_its_layers_alone() -> None:
    num_keys = 500
    layer = parse_yaml("\n".join(f"k{i}: {{a: [1]}}" for i in range(num_keys)), source="x")
    counted = YamlSource(layer.data, CountedPlaces(layer.places))
    data: dict[str, Any] = {}
    places = CountedPlaces()
    merge(data, places, counted)
    merge(data, places, counted)
    assert data == layer.data
    assert dict.items(places) == layer.places.items() - {((), Place("x", 1))}
    assert places.num_seen + counted.places.num_seen <= 4 * len(layer.places)  # type: ignore[attr-defined]


def test_a_document_of_too_many_values_is_refused(jobs: Path) -> None:
    many = "".join(f"k{i}: {i}\n" for i in range(11_000))
    write(jobs, many="extends: base\n" + many)
    assert "more than 20000 keys and values" in error_of(PresetLibrary([jobs]), "many").what


def test_a_flag_of_absurd_depth_is_refused() -> None:
    error_of(PresetLibrary(), "smoke", sets=[".".join(["a"] * 40) + "=1"], kind=UsageError)


@pytest.mark.parametrize("name", ["a" * 64, "a" * 5000, "a" * 5000 + ".yaml"])
def test_a_name_longer_than_any_is_no_preset(name: str, jobs: Path) -> None:
    assert "no " in error_of(PresetLibrary(), name, kind=UsageError).what
    write(jobs, child=f"extends: {name}\n")
    assert "extends: must be the name of a preset" in error_of(PresetLibrary([jobs]), "child").what


def test_a_broken_file_is_listed_among_the_others(jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(jobs, broken="a: [1", good="extends: base\ndescription: A good one.\n")
    write(jobs / "overlays", latin="")
    (jobs / "overlays" / "latin.yaml").write_bytes(b"\xff")
    assert run(["presets", "list", "--jobs", str(jobs)]) == 0
    shown = capsys.readouterr().out
    assert "A good one." in shown
    assert "broken: " in shown
    assert run(["presets", "list", "--jobs", str(jobs), "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    errors = {e["name"]: e["error"] for e in (*document["presets"], *document["overlays"]) if e["error"]}
    assert errors.keys() == {"broken", "latin"}
    assert "not valid YAML" in errors["broken"]
    assert "not UTF-8" in errors["latin"]
