"""Cutting the rows of all micro-batches into tiles of slots, each the work of one program on the GPU."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

SLOT_ALIGNMENT: Final = 16
"""Where a row's slots start is a multiple of this, and so is a chunk's number of slots: reads are aligned."""

TILE_SLOTS: Final = 256
"""Slots of a tile, at most."""


def token_tiles(
    chunk: ArrayLike, first_slot: ArrayLike, end_slot: ArrayLike, row: ArrayLike
) -> NDArray[np.int32]:
    """int32 [num_tiles, 4]: chunk, first slot, number of slots, row; for rows given by the same four numbers.

    The four arguments have one number a row. Rows that are not to be scored are left out by the caller.
    """
    chunk, first, end, row = (
        np.asarray(column, dtype=np.int64) for column in (chunk, first_slot, end_slot, row)
    )
    num_tiles = -((first - end) // TILE_SLOTS)
    of_row = np.repeat(np.arange(num_tiles.size), num_tiles)
    index_in_row = np.arange(of_row.size) - np.repeat(num_tiles.cumsum() - num_tiles, num_tiles)
    start = first[of_row] + index_in_row * TILE_SLOTS
    length = np.minimum(end[of_row] - start, TILE_SLOTS)
    return np.stack([chunk[of_row], start, length, row[of_row]], axis=1).astype(np.int32)


def on_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy of a host array on `device`; to a GPU from pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
