"""The reference model's offloading on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.fsdp import CPUOffloadPolicy
from verl.workers.engine.fsdp import transformer_impl


@contextmanager
def without_pinned_memory() -> Iterator[None]:
    """Let verl build a module whose offload policy does not pin memory, which takes an accelerator's driver.

    verl asks for pinned memory without a setting, so its name for the policy is replaced meanwhile.
    """

    def unpinned(**_settings: Any) -> CPUOffloadPolicy:
        return CPUOffloadPolicy(pin_memory=False)

    transformer_impl.CPUOffloadPolicy = unpinned
    try:
        yield
    finally:
        transformer_impl.CPUOffloadPolicy = CPUOffloadPolicy
