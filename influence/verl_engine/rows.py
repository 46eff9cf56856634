"""Rows (responses) and their tokens in verl's batches: who a row is, and where its tokens are predicted.

verl's batches are jagged: sequence b has its prompt's and then its response's tokens, one sequence after the
other (the *packed* layout). The model sees either that, as one row of tokens, or sequences padded on the
right. A response token's log-probability, and so its score, belongs to the position *before* it, which
predicts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NOT_CAPTURED = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """A response as verl hands it over: columns of L tokens, of which some are the policy's own (`mask`).

    Its prompt has P tokens. A *position* is named by the token that it predicts: 0 to L - 1 for the
    response's tokens, 1 - P to -1 for the prompt's (position p predicts the prompt's token P + p, and
    nothing predicts the prompt's first token).
    """

    uid: str
    """Of the prompt's group."""
    prompt_index: int
    session_id: int
    reward: float
    prompt_ids: npt.NDArray[np.int64]
    """[P]"""
    mask: npt.NDArray[np.bool_]
    """False for tokens that the policy did not generate, such as a tool's answer."""
    token_ids: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float32]
    """Before this step's update."""
    advantages: npt.NDArray[np.float32]

    @property
    def key(self) -> tuple[str, int]:
        """Identifies the row within its step."""
        return self.uid, self.session_id

    @property
    def is_padding(self) -> bool:
        """verl fills batches up with rows that count for nothing."""
        return self.uid.startswith("pad")

    def positions(self, option: str) -> npt.NDArray[np.int64]:
        """The positions that are captured, in order: the policy's own tokens', or for ``all`` every one."""
        if option == "all":
            return np.arange(1 - len(self.prompt_ids), len(self.mask))
        return np.flatnonzero(self.mask)

    def tokens_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The ids of the tokens that these positions predict."""
        return np.concatenate([self.prompt_ids, self.token_ids])[len(self.prompt_ids) + positions]

    def log_probs_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """`log_probs` there; NaN at the prompt's positions, for which verl computes none."""
        return np.where(positions < 0, np.float32(np.nan), self.log_probs[np.maximum(positions, 0)])

    def advantages_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """`advantages` there; at the prompt's positions the response's where it has but one, else NaN."""
        is_constant = bool((self.advantages == self.advantages[:1]).all())
        of_prompt = self.advantages[0] if is_constant else np.float32(np.nan)
        return np.where(positions < 0, of_prompt, self.advantages[np.maximum(positions, 0)])


def read_rows(data: Any) -> list[Row]:
    """The rows of verl's batch, in its order.

    Args:
        data: TensorDict with jagged ``prompts``, ``responses``, ``response_mask``, ``old_log_probs``,
        ``advantages``,
            ``rm_scores`` and, a row each, ``uid``, ``index``, ``session_id``.
    """
    columns = {
        name: _per_row(data[name])
        for name in ("prompts", "responses", "response_mask", "old_log_probs", "advantages")
    }
    rewards = [float(scores.sum()) for scores in _per_row(data["rm_scores"])]
    uids, indices, sessions = (_values(data[name]) for name in ("uid", "index", "session_id"))
    return [
        Row(
            uid=str(uids[b]),
            prompt_index=int(indices[b]),
            session_id=int(sessions[b]),
            reward=rewards[b],
            prompt_ids=columns["prompts"][b].numpy().astype(np.int64),
            mask=columns["response_mask"][b].numpy().astype(np.bool_),
            token_ids=columns["responses"][b].numpy().astype(np.int64),
            log_probs=columns["old_log_probs"][b].float().numpy(),
            advantages=columns["advantages"][b].float().numpy(),
        )
        for b in range(len(uids))
    ]


def _per_row(jagged: Any) -> list[Tensor]:
    values, offsets = jagged.values().detach().cpu(), jagged.offsets().tolist()
    return [values[start:end] for start, end in pairwise(offsets)]


def _values(column: Any) -> list[Any]:
    """A column of plain values, which a TensorDict keeps as a tensor or as a kind of list."""
    return column.tolist() if isinstance(column, Tensor) else list(column)


def predicting_positions(data: Any) -> Tensor:
    """Where each response token is predicted: indices into the packed layout, int64 [all L], on the CPU."""
    starts = data["input_ids"].offsets()[:-1].cpu()
    prompt_lengths = data["prompts"].offsets().diff().cpu()
    response_lengths = data["responses"].offsets().diff().cpu()
    first = starts + prompt_lengths - 1
    return torch.cat(
        [
            torch.arange(begin, begin + length)
            for begin, length in zip(first.tolist(), response_lengths.tolist(), strict=True)
        ]
    )


def packed_row_ids(data: Any, row_ids: Sequence[int], positions: str = "response") -> Tensor:
    """The row of every token in the packed layout, int64 [tokens], CPU; -1 where nothing is captured.

    Args:
        row_ids: an id for each sequence, -1 for those that are left out.
        positions: ``response`` marks where the policy's own tokens are predicted, ``all`` every position of a
            sequence but the last, which predicts nothing. A response without own tokens is left out.
    """
    ids = torch.tensor(row_ids, dtype=torch.int64)
    mask = data["response_mask"].values().cpu() != 0
    response_lengths = data["responses"].offsets().diff().cpu()
    if positions == "all":
        offsets = data["input_ids"].offsets().cpu()
        ids = torch.where(_sum_by_row(mask, response_lengths) > 0, ids, NOT_CAPTURED)
        packed = torch.repeat_interleave(ids, offsets.diff())
        packed[offsets[1:] - 1] = NOT_CAPTURED
        return packed
    ids_L = torch.repeat_interleave(ids, response_lengths)
    ids_L[~mask] = NOT_CAPTURED
    packed = torch.full((data["input_ids"].values().shape[0],), NOT_CAPTURED)
    packed[predicting_positions(data)] = ids_L
    return packed


def _sum_by_row(values_L: Tensor, lengths: Tensor) -> Tensor:
    row_L = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
    return torch.zeros(lengths.numel(), dtype=torch.int64).index_add_(0, row_L, values_L.long())


def as_model_grid(packed_T: Tensor, data: Any, grid: Sequence[int]) -> Tensor:
    """A packed int64 column in the shape of the model's ``input_ids``; -1 on padding.

    Args:
        grid: (1, tokens and padding behind them) when packed, else (sequences, longest sequence).

    Raises:
        ValueError: the grid cannot hold the tokens.
    """
    rows = torch.full(tuple(grid), NOT_CAPTURED)
    if grid[0] == 1 and grid[1] >= packed_T.numel():
        rows[0, : packed_T.numel()] = packed_T
        return rows
    offsets = data["input_ids"].offsets().tolist()
    if len(offsets) - 1 != grid[0] or max(end - start for start, end in pairwise(offsets)) > grid[1]:
        raise ValueError(
            f"the model's grid {tuple(grid)} does not hold the batch's {packed_T.numel()} tokens"
        )
    for b, (start, end) in enumerate(pairwise(offsets)):
        rows[b, : end - start] = packed_T[start:end]
    return rows


def packed_weights(data: Any, objective: str) -> Tensor:
    """Weight of every token's log-probability in the objective, float32 [tokens], on the batch's device.

    The objective is then ``sum_t weight_t log pi_t`` with the advantage (``log_prob_advantage``) or 1
    (``log_prob``) at the policy's own response tokens, and 0 elsewhere.
    """
    mask = data["response_mask"].values().float()
    weights = mask * data["advantages"].values().float() if objective == "log_prob_advantage" else mask
    packed = torch.zeros(data["input_ids"].values().shape[0], device=weights.device)
    packed[predicting_positions(data).to(weights.device)] = weights
    return packed
