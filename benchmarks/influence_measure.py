"""What the influence benchmarks share: clocks, medians, the machine, and where the results go."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of repeated runs of one thing."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the distance between the quartiles; 0 for less than four runs."""
        if len(self.seconds) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2

    def to_json(self) -> dict[str, Any]:
        return {"median_s": self.median, "spread_s": self.spread, "runs_s": list(self.seconds)}


def require_gpu(parser: argparse.ArgumentParser, *, tiny: bool) -> None:
    """Exit with one line where full sizes were asked for and nothing but a CPU is there."""
    if not tiny and not torch.cuda.is_available():
        parser.error("no GPU here, and full sizes take hours without; --tiny tries it on a CPU")


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has done what it was given; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long `run` takes by the clock, from an idle GPU to an idle GPU."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int,
    warm_ups: int,
    tidy: Callable[[], object] | None = None,
) -> dict[str, Times]:
    """Time the variants in turn, round after round, so that clocks and heat change for all of them alike.

    Every other round goes backwards, so that none is always the one that follows another. `tidy` runs
    after each and is not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(warm_ups + repeats):
        order = list(variants) if round_ % 2 == 0 else list(reversed(variants))
        for name in order:
            taken = wall_seconds(variants[name], device)
            if tidy is not None:
                tidy()
            if round_ >= warm_ups:
                seconds[name].append(taken)
    return {name: Times(tuple(taken)) for name, taken in seconds.items()}


def ratio(times: Times, base: Times) -> Times:
    """Run by run, of two variants that were timed in turn: more telling than a ratio of medians."""
    return Times(tuple(a / b for a, b in zip(times.seconds, base.seconds, strict=True)))


def read_bytes_per_second(device: torch.device) -> float:
    """The rate at which the device's memory can be read: a float32 sum over 8.6 GB of random numbers (8 MB on
    a CPU)."""
    numbers = torch.randn(2**31 if device.type == "cuda" else 2**21, device=device)
    times = interleaved({"read": lambda: torch.sum(numbers)}, device, repeats=9, warm_ups=2)["read"]
    return numbers.numel() * 4 / times.median


def machine(device: torch.device) -> dict[str, str]:
    """What ran this, and when."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in cells
    ]
    rules = ["-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])


def publish(results: Mapping[str, Any], tables: Sequence[str], path: Path | None) -> None:
    """Print the tables, and write everything as JSON where a path is given."""
    about = results["machine"]
    print(f"\n{about['device']}, torch {about['torch']}, Python {about['python']}, {about['date']}")
    print(f"    {about['command']}\n")
    print("\n\n".join(tables), flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
