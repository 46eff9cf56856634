"""Small tables of the host, brought to the device in one copy that the host does not wait for, and results
brought back in one that it does wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor


def to_device(columns: Sequence[ArrayLike], device: torch.device) -> list[Tensor]:
    """Whole numbers as int64 and others as float64, each in its own shape, by a single copy.

    From a page-locked buffer on a GPU, where a copy from ordinary memory would wait for the stream.
    """
    arrays = [_eight_bytes(np.asarray(column)) for column in columns]
    buffer = np.concatenate([array.reshape(-1).view(np.int64) for array in arrays])
    host = torch.from_numpy(buffer)
    if device.type == "cuda":
        host = host.pin_memory()
    flat = host.to(device, non_blocking=True)
    parts = torch.split(flat, [array.size for array in arrays])
    return [
        (part.view(torch.float64) if array.dtype == np.float64 else part).view(array.shape)
        for part, array in zip(parts, arrays, strict=True)
    ]


class HostCopy:
    """A tensor on its way to the CPU: `tensor` can be cut into views at once, and read after `wait`."""

    def __init__(self, source: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if not source.is_cuda:
            self.tensor = source.cpu()
            return
        self.tensor = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self.tensor.copy_(source, non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record(torch.cuda.current_stream(source.device))

    def wait(self) -> None:
        """Until the numbers are there; the host is free before that."""
        if self._arrived is not None:
            self._arrived.synchronize()


def _eight_bytes(values: NDArray[Any]) -> NDArray[Any]:
    is_whole = values.dtype.kind in "biu"
    return np.ascontiguousarray(values, dtype=np.int64 if is_whole else np.float64)
