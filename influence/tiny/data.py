"""The additions as Parquet files with verl's columns."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from influence.tiny.arithmetic import DATA_SOURCE, Addition, random_additions
from influence.tiny.cache import cached_directory


@dataclass(frozen=True, slots=True, kw_only=True)
class ArithmeticData:
    """How many additions, and which."""

    num_train: int = 512
    num_validation: int = 32
    seed: int = 0


@dataclass(frozen=True, slots=True)
class DataFiles:
    train: Path
    validation: Path


def arithmetic_files(data: ArithmeticData, root: Path | None = None) -> DataFiles:
    """Paths of the two files, written first where the cache has none."""

    def build(directory: Path) -> None:
        # One draw, so that no addition is in both files.
        additions = random_additions(data.num_train + data.num_validation, random.Random(data.seed))
        _write_parquet(additions[: data.num_train], "train", directory / "train.parquet")
        _write_parquet(additions[data.num_train :], "validation", directory / "validation.parquet")

    directory = cached_directory("arithmetic", {"format": 1, **asdict(data)}, build, root)
    return DataFiles(directory / "train.parquet", directory / "validation.parquet")


def _write_parquet(additions: list[Addition], split: str, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(
        [_row(index, addition, split) for index, addition in enumerate(additions)]
    )
    pyarrow.parquet.write_table(table, path)


def _row(index: int, addition: Addition, split: str) -> dict[str, Any]:
    """verl's columns; ``extra_info.index`` is what tells the prompts of a step apart."""
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": addition.question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(addition.answer)},
        "extra_info": {"index": index, "split": split},
    }
