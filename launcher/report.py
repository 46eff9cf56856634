"""The tables of a run's work-log, made from its collected copy alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any

from influence.rundir.attempts import AttemptRecord
from influence.rundir.clock import parse_time
from influence.rundir.exits import describe
from influence.rundir.fields import plain_numbers
from influence.rundir.paths import RunPaths
from launcher.capture_table import capture
from launcher.checks import Check, Result, validate
from launcher.evidence import CollectedRun, npz_name
from launcher.manifest import Finding, Manifest, Problem
from launcher.tables import Table
from launcher.timing_tables import scoring_time, step_time

_MAX_ROWS = 24
_ABSENT = "-"


def tables(run: CollectedRun) -> list[Table]:
    """All tables, in the order of a work-log."""
    checks = validate(run)
    sections = [
        _summary(run, checks),
        _scope(run),
        findings_table(run.manifest),
        _validation(checks),
        _score_files(run),
        capture(run),
        scoring_time(run),
        step_time(run),
        _code(run),
        _attempts(run),
        _links(run),
    ]
    return [section for section in sections if section is not None]


def document(run: CollectedRun) -> dict[str, Any]:
    """The same as ``--output json`` prints it: numbers where the tables have formatted cells."""
    manifest = run.manifest.to_dict()
    return {
        "run": run.run,
        "state": run.manifest.state,
        "results": str(run.folder / run.run),
        "source": run.manifest.source,
        "collected_at": run.manifest.collected_at,
        "total_steps": run.manifest.num_total_steps,
        "spec_hash": run.run_spec.spec_hash,
        "spec": run.run_spec.spec,
        "findings": manifest["findings"],
        "validation": [
            {"check": c.name, "expected": c.expected, "found": c.found, "result": c.result.value}
            for c in validate(run)
        ],
        "steps": [
            {
                "step": step,
                "attempt": record.attempt,
                "replay": record.replay,
                "committed_at": record.committed_at,
                "file": npz_name(record),
                "bytes": record.bytes,
                "sha256": record.sha256,
                "scores": manifest["scores"].get(npz_name(record)),
                "capture": plain_numbers(run.capture_counts(step)),
                "timings_s": plain_numbers(run.timings(step)),
            }
            for step, record in run.steps.items()
        ],
        "attempts": [attempt.to_dict() for attempt in run.attempts],
        "wandb": {"mode": run.wandb_mode, "url": run.wandb_url, "verified": False},
    }


def findings_table(manifest: Manifest) -> Table | None:
    """What is missing, torn, corrupt or foreign; None where nothing is."""
    rows = [
        (
            finding.problem + (" at the source" if finding.harmless else ""),
            _steps(steps) or _ABSENT,
            _text(finding.attempt),
            finding.file + (" ..." if len(steps) > 1 else ""),
            finding.reason,
        )
        for finding, steps in _grouped(manifest.findings)
    ]
    if not rows:
        return None
    harmless = any(finding.harmless for finding in manifest.findings)
    return Table(
        "Missing or damaged",
        ("problem", "step", "attempt", "file", "reason"),
        rows,
        notes=["At the source: the collected copy has this file, good."] if harmless else (),
    )


def _grouped(findings: Iterable[Finding]) -> list[tuple[Finding, list[int]]]:
    """Steps in a row that are missing for the same reason become one finding."""
    groups: list[tuple[Finding, list[int]]] = []
    for finding in findings:
        steps = [] if finding.step is None else [finding.step]
        if groups and steps:
            first, so_far = groups[-1]
            same = (first.problem, first.reason, first.harmless) == (
                finding.problem,
                finding.reason,
                finding.harmless,
            )
            if same and finding.problem is Problem.MISSING and so_far and so_far[-1] + 1 == finding.step:
                so_far += steps
                continue
        groups.append((finding, steps))
    return groups


def _summary(run: CollectedRun, checks: Sequence[Check]) -> Table:
    num_good = sum(run.facts(step) is not None for step in run.steps)
    total = run.manifest.num_total_steps
    last = max((record.committed_at for record in run.steps.values()), default=None)
    counts = Counter(check.result for check in checks)
    rows = [
        ("state", f"{run.manifest.state}: {num_good} of {total} steps collected and verified"),
        ("checks", ", ".join(f"{counts[result]} {result.in_words}" for result in Result)),
        ("started", f"{_time(run.started_at)}, last step {_time(last)} (UTC)"),
        ("collected", f"{_time(run.manifest.collected_at)} from {run.manifest.source}"),
        ("to", str(run.folder / run.run)),
    ]
    return Table(run.run, ("", ""), rows)


def _scope(run: CollectedRun) -> Table:
    def get(path: str) -> str:
        return _text(run.setting(path))

    gpu = f", {get('hardware.gpu_product')}" if run.setting("hardware.device") == "cuda" else ""
    influence = run.setting("influence")
    options = influence if isinstance(influence, dict) else {}
    rows = [
        ("preset", " + ".join([get("preset"), *map(str, run.setting("overlays") or [])])),
        ("model", f"{get('model.path')} ({get('model.source')}), {get('model.dtype')}, "
                  f"{get('model.attn_implementation')}"),
        ("data", f"{get('data.source')}; prompts of at most {get('data.max_prompt_length')} tokens, "
                 f"responses of at most {get('data.max_response_length')}"),
        ("batch", f"{get('training.prompts_per_step')} prompts x {get('training.responses_per_prompt')} "
                  f"responses a step; mini-batches of {get('training.mini_batch_prompts')} prompts, "
                  f"ppo_epochs {get('training.ppo_epochs')}"),
        ("training", f"steps {get('training.total_steps')}, learning rate {get('training.learning_rate')}, "
                     f"{get('training.loss_agg_mode')}, seed {get('training.seed')}"),
        ("rollout", f"{get('rollout.name')}, temperature {get('rollout.temperature')}"),
        ("hardware", f"{get('hardware.nodes')} x {get('hardware.ranks_per_node')} ranks (nodes x ranks), "
                     f"{get('hardware.device')}{gpu}"),
        ("influence", " ".join(f"{name}={_text(value)}" for name, value in options.items())),
        ("stored", f"scores {get('store.scores_dtype')}; {get('store.columns')}"),
        ("spec hash", run.run_spec.spec_hash),
    ]  # fmt: skip
    return Table("Scope", ("", ""), rows)


def _validation(checks: Sequence[Check]) -> Table:
    rows = [(check.name, check.expected, check.found, check.result) for check in checks]
    return Table("Validation", ("check", "expected", "found", "result"), rows, right=frozenset({1, 2}))


def _score_files(run: CollectedRun) -> Table | None:
    headers = (
        "step", "attempt", "rows", "scored", "accepted", "positions",
        "NaN", "min", "median", "max", "file, MB",
    )  # fmt: skip
    rows = []
    for step, record in run.steps.items():
        facts = run.facts(step)
        if facts is None:
            rows.append([str(step), str(record.attempt), *[_ABSENT] * (len(headers) - 2)])
            continue
        counts = (
            facts.num_rows,
            facts.num_scored_rows,
            facts.num_accepted_rows,
            facts.num_positions,
            facts.num_nan,
        )
        quantiles = (facts.quantiles.get(name) for name in ("min", "median", "max"))
        rows.append([
            str(step),
            str(record.attempt),
            *(f"{count:,}" for count in counts),
            *(_ABSENT if value is None else f"{value:.3g}" for value in quantiles),
            f"{record.bytes / 1e6:,.3f}",
        ])  # fmt: skip
    if not rows:
        return None
    rows, notes = elided(rows)
    return Table("Score files", headers, rows, frozenset(range(len(headers))), notes)


def _code(run: CollectedRun) -> Table:
    tree = "unknown: not a git checkout"
    if run.setting("code.dirty") is not None:
        tree = "clean"
    if run.setting("code.dirty"):
        tree = f"differs from the commit; SHA-256 of the difference: {_text(run.setting('code.diff_sha256'))}"
    rows = [
        ("version", _text(run.setting("code.version"))),
        ("git commit", _text(run.setting("code.git_commit"))),
        ("tree", tree),
    ]
    return Table("Code", ("", ""), rows)


def _attempts(run: CollectedRun) -> Table:
    headers = ("attempt", "started (UTC)", "min", "from", "steps", "replayed", "ended")
    rows = []
    for attempt in run.attempts:
        own = [step for step, record in run.steps.items() if record.attempt == attempt.number]
        replayed = [r for r in run.replays if r.attempt == attempt.number]
        same = [r.step for r in replayed if r.equal]
        other = [r.step for r in replayed if not r.equal]
        replays = [f"{_steps(s)} ({word})" for s, word in ((same, "equal"), (other, "different")) if s]
        rows.append((
            str(attempt.number),
            _time(attempt.started_at),
            _minutes(attempt),
            f"step {attempt.resumed_from}" if attempt.resumed_from else "scratch",
            _steps(own) or "none",
            ", ".join(replays) or "none",
            end_in_words(attempt, is_last=attempt is run.attempts[-1]),
        ))  # fmt: skip
    notes = [
        f"On {host}: attempt {_steps([a.number for a in run.attempts if a.host == host])}."
        for host in dict.fromkeys(attempt.host for attempt in run.attempts)
    ]
    notes = notes or ["No attempt has started."]
    return Table("Attempts", headers, rows, right=frozenset({0, 2}), notes=notes)


def _links(run: CollectedRun) -> Table:
    url = run.wandb_url
    if run.wandb_mode == "disabled":
        link = "disabled"
    elif run.wandb_mode == "offline":
        wandb = run.run_spec.wandb
        # The entity is whose key uploads it.
        then = url or f"<entity>/{wandb.get('project')}/runs/{wandb.get('run_id')}"
        sync = f"wandb sync {RunPaths(Path(run.manifest.source)).wandb_dir}/offline-run-*"
        link = f"offline; `{sync}` makes it {then} (unverified)"
    elif url:
        link = f"{url} (unverified: built from entity, project and run id)"
    else:
        link = "online, but the entity is not known from here; see the log of an attempt"
    return Table("Links", ("", ""), [("W&B", link)])


def end_in_words(attempt: AttemptRecord, is_last: bool) -> str:
    """How an attempt ended; the last one may run still, and looks then like one that was killed at once."""
    if attempt.exit_code is None:
        return "no end recorded: runs, or was killed" if is_last else "killed before it could say how"
    words = describe(attempt.exit_code)
    return f"{words}: {attempt.reason}" if attempt.reason and attempt.reason not in words else words


def elided(rows: Sequence[list[str]]) -> tuple[list[list[str]], list[str]]:
    """The first and last rows of a long table, and a note that says so."""
    if len(rows) <= _MAX_ROWS:
        return list(rows), []
    half = _MAX_ROWS // 2
    gap = ["..."] + [""] * (len(rows[0]) - 1)
    note = f"{len(rows) - _MAX_ROWS} rows in between are left out; --output json has all."
    return [*rows[:half], gap, *rows[-half:]], [note]


def _steps(steps: Sequence[int]) -> str:
    """``1-3, 7``."""
    ranges: list[list[int]] = []
    for step in steps:
        if ranges and ranges[-1][1] + 1 == step:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def _text(value: Any) -> str:
    if value is None:
        return _ABSENT
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(_text(item) for item in value)
    return str(value)


def _time(moment: str | None) -> str:
    return _ABSENT if moment is None else f"{parse_time(moment).astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _minutes(attempt: AttemptRecord) -> str:
    if attempt.ended_at is None:
        return _ABSENT
    took = parse_time(attempt.ended_at) - parse_time(attempt.started_at)
    return f"{took.total_seconds() / 60:.1f}"
