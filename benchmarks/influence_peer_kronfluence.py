"""Per-token scores by kronfluence: its analyzer with the identity in the Hessian's place."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task
from kronfluence.utils.common.score_arguments import (
    all_low_precision_score_arguments,
    default_score_arguments,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset


class _NextTokens(Task):
    """The loss is the sum of the next tokens' cross-entropies; a query's gradient counts by its contrast."""

    def __init__(self, module_names: Sequence[str]) -> None:
        self._names = list(module_names)

    def get_influence_tracked_modules(self) -> list[str]:
        return self._names

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return self._row_losses(batch, model).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return (self._row_losses(batch, model) * batch[1]).sum()

    @staticmethod
    def _row_losses(batch: Any, model: nn.Module) -> Tensor:
        tokens = batch[0]
        logits = model(tokens).logits[:, :-1]
        flat = logits.reshape(-1, logits.shape[-1])
        losses = cross_entropy(flat, tokens[:, 1:].flatten(), reduction="none")
        return losses.view(len(tokens), -1).sum(1)


class KronfluenceScores:
    """Scores every token by its inner product with the sum of the rows' gradients, each times its contrast.

    Unprojected, over the layers' weights (and the biases of those that have one). It wraps the model's
    layers: the model is of no use to anyone else afterwards.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        contrast: Sequence[float],
        module_names: Sequence[str],
        *,
        micro_batch_rows: int,
    ) -> None:
        self._task = _NextTokens(module_names)
        self._model = prepare_model(model, self._task)
        self._data = TensorDataset(tokens.cpu(), torch.tensor(contrast))
        self._rows = micro_batch_rows
        parameter = next(model.parameters())
        self._on_cpu = parameter.device.type == "cpu"
        if parameter.dtype == torch.bfloat16:
            self._arguments = all_low_precision_score_arguments()
        else:
            self._arguments = default_score_arguments()
        self._arguments.compute_per_token_scores = True
        self._arguments.aggregate_query_gradients = True

    def scores(self) -> list[Tensor]:
        """float32, one tensor a row."""
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer(
                "tokens",
                self._model,
                self._task,
                cpu=self._on_cpu,
                disable_tqdm=True,
                output_dir=folder,
            )
            analyzer.fit_all_factors(
                "identity", self._data, self._rows, factor_args=FactorArguments(strategy="identity")
            )
            analyzer.compute_pairwise_scores(
                "scores",
                "identity",
                query_dataset=self._data,
                train_dataset=self._data,
                per_device_query_batch_size=self._rows,
                per_device_train_batch_size=self._rows,
                score_args=self._arguments,
            )
            scores = analyzer.load_pairwise_scores("scores")["all_modules"]
        return [row.float() for row in scores[0]]
