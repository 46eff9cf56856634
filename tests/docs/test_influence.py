"""``docs/influence.md``: its examples run and print what it says, and what it names exists."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from influence import MemoryEstimate, TracerConfig, estimate_memory
from influence.config import ALIASES, CHOICES
from influence.kernels import SLOT_ALIGNMENT
from influence.layout import FactorLayout
from influence.projection import projected_widths
from influence.rundir import RunPaths, claim_attempt
from influence.score import RowScores
from influence.timing import PARTS, PHASES
from influence.tracer import COUNTERS
from influence.verl_engine.fused import REASONS, WAYS
from launcher.presets import PresetLibrary
from tests.rundir.steps import SPEC, STORE, step_arrays

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "influence.md").read_text()
FIRST, SHARED, PACKED_LORA, READING, MEMORY = re.findall(r"(?s)```python\n(.*?)```", PAGE)
OPTIONS = {
    cells[0].strip("`"): cells[1:]
    for cells in (
        [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")]
        for line in PAGE.partition("## Settings")[2].partition("\n\n**")[0].split("\n")
        if line.startswith("| `")
    )
}

SETTING = r"(?<![a-z_.])([a-z_]+): (\[[^\]]*\]|-?[a-z0-9_.]+)"


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(code, "docs/influence.md", "exec"), names)  # noqa: S102  (the page is ours)
    return names


@pytest.fixture(scope="module")
def first() -> dict[str, Any]:
    """What the first example leaves behind, by name; without the lines that print."""
    names: dict[str, Any] = {"__name__": "page"}
    return run(FIRST.partition("\nprint(")[0], names)


def test_the_first_example_prints_what_the_page_shows(
    first: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run("print(" + FIRST.partition("\nprint(")[2], dict(first))
    numbers = re.compile(r"-?\d+\.\d+")
    shown = PAGE.partition(FIRST)[2].partition("\n\n")[2].partition("\n\n")[0]
    assert shown.startswith("    tensor(")
    printed = capsys.readouterr().out
    assert [float(n) for n in numbers.findall(printed)] == pytest.approx(
        [float(n) for n in numbers.findall(shown)], abs=2e-3
    )
    assert numbers.sub("", printed).split() == numbers.sub("", shown).split()


def test_the_first_example_is_as_the_page_says(first: dict[str, Any]) -> None:
    rows = first["rows"]
    assert [row.row_id for row in rows] == list(range(16))
    for row in rows:
        assert row.scores.shape == (6,)
        assert row.scored
        assert row.scores.sum().item() == pytest.approx(row.total, rel=1e-4, abs=1e-5)
    scores = torch.stack([row.scores for row in rows])
    for sign in (1, -1):
        mean = scores[first["advantages"] == sign].mean(dim=0)
        assert mean.argmax() == 2, "accepted and rejected alike"
    assert_planted_stands_out(rows)


def test_the_planted_pattern_is_found_whatever_the_seed() -> None:
    for seed in (1, 2):
        code = FIRST.partition("\nprint(")[0].replace("manual_seed(0)", f"manual_seed({seed})")
        assert_planted_stands_out(run(code, {"__name__": "page"})["rows"])


def assert_planted_stands_out(rows: list[RowScores]) -> None:
    mean = torch.stack([row.scores for row in rows]).mean(dim=0)
    assert mean[2] > 2.5 * mean[[0, 1, 3, 4, 5]].abs().max()


def test_the_backward_fills_grad_as_it_would_without_a_tracer(first: dict[str, Any]) -> None:
    def gradients() -> list[torch.Tensor]:
        return [parameter.grad.clone() for parameter in first["model"].parameters()]

    columns = [first[name] for name in ("inputs", "sequence", "targets", "weights")]
    captured = []
    for tracing in (True, False):
        first["model"].zero_grad()
        if tracing:
            with first["tracer"].capture(first["row_ids"]) as handle:
                first["objective"](*columns).backward()
                handle.discard()
        else:
            first["objective"](*columns).backward()
        captured.append(gradients())
    assert all(torch.equal(a, b) for a, b in zip(*captured, strict=True))


def test_a_shared_forward_over_a_packed_batch_gives_the_same_scores(first: dict[str, Any]) -> None:
    names = dict(first)
    before, _, after = SHARED.partition("    loss = ")
    untouched = "    assert all(p.grad is None for p in model.parameters())\n"
    run(before + untouched + "    loss = " + after, names)
    for row, other in zip(first["rows"], names["again"], strict=True):
        torch.testing.assert_close(other.scores, row.scores, rtol=1e-3, atol=1e-4)
    assert all(p.grad is not None for p in names["model"].parameters())


def test_gradient_scale_stands_in_for_the_backward_of_the_objective(first: dict[str, Any]) -> None:
    columns = [first[name] for name in ("inputs", "sequence", "targets")]
    factor = torch.linspace(-2, -1, 16)
    with first["tracer"].capture(first["row_ids"]) as handle:
        handle.gradient_scale = {row: float(1 / factor[row]) for row in range(16)}
        first["objective"](*columns, first["weights"] * factor[:, None]).backward()
    again = first["tracer"].pop_rows(groups=[0] * 8 + [1] * 8, contrast=[1.0] * 16)
    for row, other in zip(first["rows"], again, strict=True):
        torch.testing.assert_close(other.scores, row.scores, rtol=1e-3, atol=1e-4)


def test_packed_sequences_of_a_lora_model_score_as_they_do_one_by_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = run(PACKED_LORA, {"__name__": "page"})
    assert f"    {capsys.readouterr().out.strip()}" == PAGE.partition(PACKED_LORA)[2].split("\n")[2]
    tracer, model = names["tracer"], names["model"]
    assert all(row.scores.abs().max() > 0.1 for row in names["rows"])
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in tracer.module_names} == {
        "lora_A",
        "lora_B",
    }
    for row, tokens in enumerate(names["sequences"]):
        captured = torch.full((1, len(tokens) - 1), row)
        captured[:, :3] = -1
        with tracer.capture(captured):
            log_probs = model(input_ids=tokens[None, :-1]).logits.log_softmax(-1)
            chosen = log_probs[0, 3:].gather(1, tokens[4:, None])
            (names["advantages"][row] * chosen).sum().backward()
    alone = tracer.pop_rows(groups=[0] * 4, contrast=[1.0] * 4)
    for one, other in zip(names["rows"], alone, strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "again"),
    [
        ("use_cache=False", "use_cache=True"),
        ("use_cache=False", "use_cache=False, attention_mask=torch.ones_like(inputs)"),
        ("position_ids=position_ids, ", ""),
    ],
)
def test_what_the_page_says_qwen2_needs_to_keep_sequences_apart_is_needed(call: str, again: str) -> None:
    right, wrong = (
        torch.cat([row.scores for row in run(code, {"__name__": "page"})["rows"]])
        for code in (PACKED_LORA, PACKED_LORA.replace(call, again))
    )
    assert (right - wrong).abs().max() > 0.1


def test_the_step_is_read_as_the_page_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = re.findall(r'load_step\("([^"]+)", 1\)', READING)
    commit_step(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    names = run(READING, {"__name__": "page"})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == sum(bool(row.scored) for row in names["step"].rows()) > 1
    assert names["table"].dtype == np.float32
    assert names["table"].shape == (3, 4)
    assert np.isnan(names["table"][1, 2:]).all()
    assert not np.isnan(names["table"][1, :2]).any()
    assert names["options"] == {"damping": 0.1, "modules": ["q_proj"]}


def test_the_memory_is_what_the_page_shows(first: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    estimate = run(MEMORY, dict(first))["estimate"]
    assert f"    {capsys.readouterr().out.strip()}" == PAGE.partition(MEMORY)[2].split("\n")[2]
    for name in set(re.findall(r"`([a-z_]+_bytes)`", PAGE)):
        assert getattr(estimate, name) > 0
    for name in (*(field.name for field in fields(MemoryEstimate)), *signature(estimate_memory).parameters):
        assert re.search(rf"\b{name}\b", PAGE.partition("## Memory")[2]), name
    assert f"a multiple of {SLOT_ALIGNMENT})" in PAGE


def commit_step(run_dir: Path) -> None:
    from influence.rundir import RunSpec, StepWriter, create_run

    paths = RunPaths(run_dir)
    spec = RunSpec.new(run_dir.name, SPEC)
    create_run(paths, spec)
    writer = StepWriter(paths, claim_attempt(paths).number, spec.spec_hash, store=STORE)
    writer.commit(1, step_arrays(lengths=(3, 2, 4)), timings={"pop_rows": 0.5}, metrics={})


def test_the_table_has_every_option_with_its_default() -> None:
    defaults = TracerConfig()
    assert list(OPTIONS) == [field.name for field in fields(TracerConfig)]
    for name, cells in OPTIONS.items():
        assert len(cells) == 4, name
        value = getattr(defaults, name)
        written = (
            f"[{', '.join(value)}]"
            if isinstance(value, tuple)
            else value
            if isinstance(value, str)
            else json.dumps(value)
        )
        assert cells[0] == f"`{written}`"


@pytest.mark.parametrize("name", CHOICES)
def test_the_table_has_every_value_of_a_choice(name: str) -> None:
    aliases = [alias for option, alias in ALIASES if option == name]
    named = re.findall(r"`([a-z_]+)`", OPTIONS[name][1])
    assert sorted(set(named)) == sorted([*CHOICES[name], *aliases])
    TracerConfig(**{name: CHOICES[name][-1]})


def settings_in(text: str) -> list[tuple[str, str]]:
    """(name, value) of all ``name: value`` in code spans."""
    return [pair for code in re.findall(r"`([^`\n]+)`", text) for pair in re.findall(SETTING, code)]


def test_the_values_in_the_text_are_values() -> None:
    named = [(name, value) for name, value in settings_in(PAGE) if name in OPTIONS]
    assert len(named) > 15
    for name, value in named:
        if value != "n":  # max_tokens_per_response: n
            TracerConfig.from_mapping({name: yaml.safe_load(value)})
    sections = re.findall(r"(?m)^    influence: \{.*\}$", PAGE)
    assert [TracerConfig.from_mapping(yaml.safe_load(section)["influence"]) for section in sections]


def test_fused_capture_asks_for_what_the_shipped_preset_has() -> None:
    """Every setting of a preset on the page exists, and those with a value have it."""
    preset = PresetLibrary().resolve("alltoken-timing").settings
    named = re.findall(r"`training\.([a-z_]+)(?:: ([a-z0-9.]+))?`", PAGE)
    assert len(named) == 5
    for name, value in named:
        assert not value or yaml.safe_load(value) == preset["training"][name]
    assert preset["training"]["mini_batch_prompts"] == preset["training"]["prompts_per_step"]


def test_the_reference_runs_settings_are_those_that_are_told() -> None:
    (paragraph,) = re.findall(r"(?s)\*\*The reference run\*\*.*?\n\n", PAGE)
    told = {name: yaml.safe_load(value) for name, value in settings_in(paragraph)}
    reference, defaults = TracerConfig.reference_run().to_mapping(), TracerConfig().to_mapping()
    assert {name: reference[name] for name in told} == told
    assert {name for name in reference if reference[name] != defaults[name]} <= set(told)


def test_every_metric_exists() -> None:
    table = PAGE.partition("`influence_trace/`")[2].partition("\n\n")[0]
    named = [
        name for line in table.split("\n") for name in re.findall(r"`([a-z_]+)`", line.partition(" | ")[0])
    ]
    source = (REPOSITORY / "influence" / "verl_engine" / "capture_pass.py").read_text()
    (in_place,) = re.findall(r'(?m)^IN_PLACE: Final = "([a-z_]+)"', source)
    fractions = {f"{way}_fraction" for way in (*WAYS, "on_policy")}
    assert set(named) == {*COUNTERS, *fractions, *(f"fallback_{reason}" for reason in (*REASONS, in_place))}
    assert all(f"`{phase}`" in PAGE for phase in (*PHASES, *PARTS))


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", PAGE))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (REPOSITORY / "docs" / link).resolve().is_file()


QWEN2_1_5B = [(1536, 1536), (1536, 256), (1536, 256), (1536, 1536), (1536, 8960), (1536, 8960), (8960, 1536)]
"""(d_in, d_out) of the seven layers of each of 28 blocks."""


def layout(factor: int) -> FactorLayout:
    widths = [projected_widths(d_in, d_out, factor, None) for d_in, d_out in QWEN2_1_5B * 28]
    return FactorLayout.of_shapes([(k_out, k_in) for k_in, k_out in widths])


def test_the_sizes_are_those_of_the_model() -> None:
    at_256 = layout(256)
    dims = [place.dim for place in at_256.places]
    assert (dims.count(210), sorted(set(dims)), len(dims)) == (84, [6, 36, 210], 196)
    for number in (at_256.num_factors, 2 * at_256.num_factors, at_256.gradient_dim, dims.count(210)):
        assert f"{number:,}" in PAGE
    for factor, times in ((128, 2), (32, 8)):
        assert layout(factor).num_factors / at_256.num_factors == pytest.approx(times, rel=0.02)
        assert layout(factor).gradient_dim / at_256.gradient_dim == pytest.approx(times**2, rel=0.02)


def test_what_the_projection_keeps_is_as_measured() -> None:
    measured = (REPOSITORY / "benchmarks" / "README.md").read_text()
    rows = re.findall(r"(?m)^\| kronfluence: .* factor (\d+) +\| +[\d.]+ \| +([\d.]+) \|", measured)
    (sentence,) = re.findall(r"(?s)rank\s+correlation to the unprojected ones of (.*?) \(", PAGE)
    told = re.findall(r"([\d.]+) at (?:factor )?(\d+)", sentence)
    assert [(f"{float(value):.2f}", factor) for factor, value in rows] == told
    assert len(told) == 3


@pytest.mark.slow
def test_the_prediction_with_prompts_left_out() -> None:
    """0.87 to 0.95 by default, 0.99 with more damping or without curvature, as the page says."""
    assert 0.85 <= prediction_with_prompts() <= 0.96
    assert prediction_with_prompts(damping=1.0) >= 0.985
    assert prediction_with_prompts(hessian="identity") >= 0.985


def prediction_with_prompts(**options: Any) -> float:
    from tests.influence.test_causal import rank_correlation
    from tests.influence.tiny_model import make_responses

    responses = [replace(r, advantage=1.0) for r in make_responses(num_responses=8, num_groups=1, seed=1)]
    return rank_correlation(responses, **options)
