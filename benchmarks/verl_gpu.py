"""Real verl with and without the tracer, on one GPU: scores, final weights and the time of the actor update.

    python benchmarks/verl_gpu.py [--steps 2] [--runs stock,again,fused,shared,separate] [--together 1]
                                  [--overlay tiny-gpu] [--set KEY=VALUE ...] [--keep DIR] [--json FILE]

Each run trains the same model from the same seed on responses that are drawn alike as long as the weights
are: ``stock`` and ``again`` with verl's own engine (`stock_verl.py`), the others through
``launcher submit --set influence.capture=...``. Then the last checkpoints are compared bit by bit with
``stock``'s, and each run's scores with ``separate``'s. ``again`` says what two runs of stock verl differ by,
``--deterministic`` has verl ask torch for deterministic algorithms in all of them.

Timings are those of verl's own metrics and of the steps' records. Runs that go side by side (``--together``)
disturb each other's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from influence.machine import this_machine
from influence.rundir import RunPaths, load_step, read_metrics

ROOT = Path(__file__).parents[1]
STOCK = ("stock", "again")
TRACED = ("fused", "shared", "separate")
PRESET = "smoke"
DETERMINISTIC = "verl={actor_rollout_ref.actor.fsdp_config.full_determinism: true}"
TIMINGS = ("capture", "forward_1", "logprob_backward", "forward_2", "loss_backward", "pop_rows")


class RunFailedError(Exception):
    """A run did not finish; says what it printed last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where runs go and what they have in common."""

    folder: Path
    options: tuple[str, ...]
    """Of the launcher's: preset, overlay, settings."""
    num_steps: int

    def paths(self, name: str) -> RunPaths:
        return RunPaths.of(self.folder / "runs", f"infl-verl-{name}")

    def train(self, name: str) -> float:
        """Train one run to its end; its seconds, all in.

        Raises:
            RunFailedError: it failed.
        """
        started = time.perf_counter()
        run = ("--backend", "local", "--name", self.paths(name).name, *self.options)
        if name in STOCK:
            document = self._finish(name, [sys.executable, "-m", "launcher", "render", *run])
            stock = [
                sys.executable,
                str(ROOT / "benchmarks" / "stock_verl.py"),
                "--root",
                str(self.folder / "runs"),
            ]
            self._finish(name, stock, document)
        else:
            words = [sys.executable, "-m", "launcher", "submit", *run, "--set", f"influence.capture={name}"]
            self._finish(name, [*words, "--follow"])
        seconds = time.perf_counter() - started
        print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        return seconds

    def _finish(self, name: str, words: Sequence[str], stdin: str = "") -> str:
        errors = self.folder / f"{name}.err"
        with errors.open("a") as stderr:
            done = subprocess.run(
                words,
                cwd=ROOT,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                    "INFL_ROOT": str(self.folder / "runs"),
                    "INFL_INDEX": str(self.folder / "index.sqlite"),
                },
                input=stdin,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                check=False,
            )
        (self.folder / f"{name}.out").write_text(done.stdout)
        if done.returncode:
            tails = "".join(
                f"\n--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
                for path in (errors, self.folder / f"{name}.out", *self.paths(name).root_dir.glob("logs/*"))
            )
            raise RunFailedError(f"{name} exited with {done.returncode}{tails}")
        return done.stdout


def report_of_run(bench: Bench, name: str) -> dict[str, Any]:
    """What a run's metrics and records say, by step."""
    paths = bench.paths(name)
    metrics = read_metrics(paths, 1)
    report: dict[str, Any] = {
        "update_actor_s": [metrics[step]["timing_s/update_actor"] for step in sorted(metrics)],
        "step_s": [metrics[step]["timing_s/step"] for step in sorted(metrics)],
        "grad_norm": [metrics[step]["actor/grad_norm"] for step in sorted(metrics)],
        "pg_loss": [metrics[step]["actor/pg_loss"] for step in sorted(metrics)],
    }
    if name in TRACED:
        records = [load_step(paths.root_dir, step).record for step in paths.committed_step_numbers()]
        for timing in TIMINGS:
            report[f"{timing}_s"] = [record.timings.get(timing) for record in records]
        ways = [name for name in metrics[1] if name.startswith("influence_trace/")]
        report |= {name: [metrics[step][name] for step in sorted(metrics)] for name in ways}
    return report


def score_agreement(bench: Bench, name: str, reference: str, step: int) -> dict[str, Any]:
    """One run's scores beside another's, of the same tokens of the same responses."""
    ours, theirs = (load_step(bench.paths(run).root_dir, step).arrays for run in (name, reference))
    if not (np.array_equal(ours.token_ids, theirs.token_ids) and list(ours.uid) == list(theirs.uid)):
        return {"same_responses": False}
    is_scored = np.repeat(np.asarray(theirs.scored), np.diff(theirs.row_offsets))
    found, expected = (np.asarray(arrays.scores, np.float64)[is_scored] for arrays in (ours, theirs))
    return {
        "same_responses": True,
        "num_tokens": len(found),
        "correlation": float(np.corrcoef(found, expected)[0, 1]),
        "relative_error": float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
        "largest_difference": float(np.abs(found - expected).max()),
        "largest_score": float(np.abs(expected).max()),
    }


def weights(bench: Bench, name: str) -> dict[str, Any]:
    """The last checkpoint's weights and optimizer moments by name, of all ranks."""
    import torch

    folder = bench.paths(name).checkpoints_dir / f"global_step_{bench.num_steps}" / "actor"
    tensors: dict[str, Any] = {}
    for kind in ("model", "optim"):
        for path in sorted(folder.glob(f"{kind}_world_size_*_rank_*.pt")):
            # Our own run's file a moment ago, and it holds DTensors.
            loaded = torch.load(path, map_location="cpu", weights_only=False)
            for key, tensor in _tensors(loaded, f"{path.stem}"):
                tensors[key] = getattr(tensor, "_local_tensor", tensor)
    if not tensors:
        raise RunFailedError(f"{name} left no checkpoint in {folder}")
    return tensors


def _tensors(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield place, value
    elif isinstance(value, dict):
        yield from chain.from_iterable(_tensors(item, f"{place}.{key}") for key, item in value.items())


def weight_agreement(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """How two checkpoints differ: not at all, or by how much."""
    import torch

    if ours.keys() != theirs.keys():
        return {"is_bitwise_equal": False, "same_names": False}
    different = [key for key in ours if not torch.equal(ours[key], theirs[key])]
    gaps = [float((ours[key].double() - theirs[key].double()).abs().max()) for key in different]
    return {
        "is_bitwise_equal": not different,
        "num_tensors": len(ours),
        "num_different": len(different),
        "largest_difference": max(gaps, default=0.0),
    }


def machine() -> dict[str, Any]:
    import torch
    import transformers
    import verl

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "verl": verl.__version__,
        "python": sys.version.split()[0],
        "num_cpus": len(os.sched_getaffinity(0)),
    }


def table(document: dict[str, Any]) -> str:
    """The document's main numbers as Markdown."""
    lines = [
        "| run | update_actor s, step 1 | later, median | weights against stock | scores against separate |"
    ]
    lines.append("|---|---:|---:|---|---|")
    for name, run in document["runs"].items():
        first, *later = run["update_actor_s"]
        weight, steps = document["weights"].get(name), document["scores"].get(name, {})
        lines.append(
            f"| `{name}` | {first:.3f} | {statistics.median(later or [first]):.3f} | "
            + (
                ""
                if weight is None
                else "equal bit by bit"
                if weight["is_bitwise_equal"]
                else f"{weight['num_different']} of {weight['num_tensors']} tensors differ, "
                f"by up to {weight['largest_difference']:.1e}"
                if "num_tensors" in weight
                else "other tensors"
            )
            + " | "
            + "; ".join(
                f"step {step}: r = {s['correlation']:.6f}, error {s['relative_error']:.1e}"
                if s["same_responses"]
                else f"step {step}: other responses"
                for step, s in steps.items()
            )
            + " |"
        )
    return "\n".join(lines)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--overlay", default="tiny-gpu")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--runs", default=",".join((*STOCK, *TRACED)))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--together", type=int, default=1, help="so many runs at the same time")
    parser.add_argument("--keep", type=Path, help="a new folder for runs and logs; default: a temporary one")
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    args = parser.parse_args(words)
    if args.overlay != "tiny-cpu" and this_machine().num_gpus == 0:
        parser.error(f"no GPU here, and the overlay {args.overlay} needs one")
    return args


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="infl-verl-") as temporary:
            yield Path(temporary)
    else:
        keep.mkdir(parents=True)
        yield keep.resolve()


def main() -> int:
    args = parse()
    names = args.runs.split(",")
    settings = [
        f"training.total_steps={args.steps}",
        "wandb.mode=disabled",
        "retry.backoff_limit=0",
        *args.settings,
    ]
    settings += [DETERMINISTIC] if args.deterministic else []
    options = ["--preset", PRESET, "--overlay", args.overlay]
    options += [word for setting in settings for word in ("--set", setting)]
    with _folder(args.keep) as folder:
        bench = Bench(folder=folder, options=tuple(options), num_steps=args.steps)
        try:
            with ThreadPoolExecutor(args.together) as pool:
                seconds = dict(zip(names, pool.map(bench.train, names), strict=True))
            runs = {name: report_of_run(bench, name) | {"all_s": seconds[name]} for name in names}
            found = {name: weights(bench, name) for name in names} if "stock" in names else {}
        except RunFailedError as error:
            print(error, file=sys.stderr)
            return 1
        document = {
            "machine": machine(),
            "settings": settings,
            "overlay": args.overlay,
            "num_at_the_same_time": args.together,
            "runs": runs,
            "weights": {
                name: weight_agreement(found[name], found["stock"]) for name in found if name != "stock"
            },
            "scores": {
                name: {
                    step: score_agreement(bench, name, "separate", step) for step in range(1, args.steps + 1)
                }
                for name in names
                if "separate" in names and name in TRACED and name != "separate"
            },
        }
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    print(table(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
