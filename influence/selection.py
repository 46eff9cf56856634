"""Which tokens of a micro-batch are captured, and in which slot of the factors each of them lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from influence.kernels import SLOT_ALIGNMENT


@dataclass(frozen=True, slots=True, eq=False)
class TokenSelection:
    """The captured tokens of a micro-batch, the tokens of a row together (T of them, R rows, W slots)."""

    grid: tuple[int, ...]
    """The shape of row_ids, captured tokens or not."""
    row_ids: tuple[int, ...]
    """R ids, increasing."""
    row_offsets: tuple[int, ...]
    """R + 1 offsets into the T tokens."""
    token_index: Tensor
    """int64 [T], CPU: where the tokens lie in the flattened grid."""
    positions: Tensor
    """int64 [T], CPU: a token's index among its row's tokens before capping."""
    row_slots: NDArray[np.int32]
    """[R, 2]: a row's first slot, a multiple of SLOT_ALIGNMENT, and the slot after its last token."""
    source: NDArray[np.int32]
    """[W]: the token (in the flattened grid) of each slot, -1 for those between rows."""

    @property
    def num_slots(self) -> int:
        """W, a multiple of SLOT_ALIGNMENT."""
        return self.source.size

    def is_grid(self, shape: Sequence[int]) -> bool:
        """Whether a layer whose values have this shape, width aside, sees these tokens in this order."""
        same = [n for n in shape if n != 1] == [n for n in self.grid if n != 1]
        return same or (len(shape) == 1 and shape[0] == prod(self.grid))


def select_tokens(row_ids: Tensor, max_tokens_per_row: int = -1) -> TokenSelection:
    """Sort the captured tokens of a grid by row, and cap each row at n evenly spaced tokens.

    `row_ids` is an int64 grid (batch, seq), or (1, tokens) when packed, with the row of each token and -1
    where nothing is captured. Of a row's L > n tokens those at ``(2 i + 1) L // (2 n)`` are kept, the
    middles of n equal stretches. A grid on an accelerator is copied to the CPU, which waits for it.

    Raises ValueError for another type, another number of dimensions, or an id below -1.
    """
    if not isinstance(row_ids, Tensor) or row_ids.dtype != torch.int64 or row_ids.dim() != 2:
        found = f"{row_ids.dtype} {tuple(row_ids.shape)}" if isinstance(row_ids, Tensor) else type(row_ids)
        raise ValueError(f"row_ids must be an int64 grid (batch, seq) or (1, tokens), not {found}")
    flat = row_ids.detach().reshape(-1).cpu().numpy()
    if flat.size and flat.min() < -1:
        raise ValueError(f"row_ids holds {flat.min()}; ids are 0 or greater, and -1 is 'not captured'")
    index = np.flatnonzero(flat >= 0)
    ids = flat[index]
    if (ids[1:] < ids[:-1]).any():
        order = np.argsort(ids, kind="stable")
        index, ids = index[order], ids[order]
    starts = np.flatnonzero(np.diff(ids, prepend=-1))
    lengths = np.diff(starts, append=ids.size)
    kept = lengths if max_tokens_per_row < 0 else np.minimum(lengths, max_tokens_per_row)
    offsets = np.concatenate([[0], kept.cumsum()])
    row = np.repeat(np.arange(kept.size), kept)
    place = np.arange(offsets[-1]) - offsets[row]
    is_capped = kept < lengths
    positions = np.where(is_capped[row], (2 * place + 1) * lengths[row] // (2 * kept[row]), place)
    token_index = index[starts[row] + positions]
    padded = -(-kept // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
    first_slots = padded.cumsum() - padded
    source = np.full(int(padded.sum()), -1, dtype=np.int32)
    source[first_slots[row] + place] = token_index
    return TokenSelection(
        grid=tuple(row_ids.shape),
        row_ids=tuple(ids[starts].tolist()),
        row_offsets=tuple(offsets.tolist()),
        token_index=torch.from_numpy(token_index),
        positions=torch.from_numpy(positions),
        row_slots=np.stack([first_slots, first_slots + kept], axis=1).astype(np.int32),
        source=source,
    )
