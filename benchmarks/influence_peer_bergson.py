"""Per-token scores by bergson: its in-memory collectors and scorer, driven as its own trainer drives them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector, Scorer
from bergson.score.score_writer import InMemoryTokenScoreWriter
from datasets import Dataset
from torch import Tensor, nn


class BergsonScores:
    """Scores every token by its inner product with the sum of the rows' gradients, each times its contrast.

    Two passes, as its users make them: one for the rows' projected gradients, one that scores the tokens. Its
    loss is the sum of the cross-entropies of the next tokens. `projections` replaces the matrices of a module
    (name -> (P_out, P_in)); without it bergson draws its own.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        contrast: Sequence[float],
        module_names: Sequence[str],
        *,
        micro_batch_rows: int,
        projection_dim: int = 16,
        projections: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self._model = model
        self._contrast = torch.tensor(contrast)
        self._names = {name.removeprefix("model.") for name in module_names}
        self._projection_dim = projection_dim
        self._projections = projections or {}
        self._scoring_s = 0.0
        rows = tokens.tolist()
        self._data = Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]})
        indices = list(range(len(rows)))
        self._batches = [
            indices[start : start + micro_batch_rows] for start in range(0, len(rows), micro_batch_rows)
        ]

    def scores(self) -> list[Tensor]:
        """float32, one tensor a row; bergson leaves out a row's last token, whose gradient is zero."""
        gradients = self._run(attribute_tokens=False, scorer=None).gradients
        query = {name: (self._contrast.to(rows) @ rows)[None] for name, rows in gradients.items()}
        device = next(self._model.parameters()).device
        scorer = Scorer(
            query,
            list(query),
            InMemoryTokenScoreWriter(self._data, 1),
            device,
            torch.float32,
            attribute_tokens=True,
        )
        started = time.perf_counter()
        collector = self._run(attribute_tokens=True, scorer=scorer)
        self._scoring_s = time.perf_counter() - started
        return [scores[:, 0] for scores in collector.scores or ()]

    def seconds_of_scoring(self) -> float:
        """Of the second pass alone, in the last call of `scores`."""
        return self._scoring_s

    def _run(self, *, attribute_tokens: bool, scorer: Scorer | None) -> InMemoryCollector:
        with tempfile.TemporaryDirectory() as folder:
            config = IndexConfig(
                run_path=folder,
                projection_dim=self._projection_dim,
                attribute_tokens=attribute_tokens,
            )
            Path(config.partial_run_path).mkdir(parents=True, exist_ok=True)
            processor = GradientProcessor(projection_dim=self._projection_dim)
            device = next(self._model.parameters()).device
            for name, (out_side, in_side) in self._projections.items():
                inner = name.removeprefix("model.")
                # Where bergson keeps the matrices that it has drawn.
                processor._projection_matrices[(inner, "left", device)] = out_side
                processor._projection_matrices[(inner, "right", device)] = in_side
            collector = InMemoryCollector(
                model=self._model.base_model,
                target_modules=self._names,
                processor=processor,
                data=self._data,
                cfg=config,
                scorer=scorer,
            )
            computer = CollectorComputer(
                self._model, self._data, collector=collector, batches=self._batches, cfg=config
            )
            computer.run_with_collector_hooks()
        return collector
