"""Linear layers with Qwen2's names whose inputs and output gradients a test chooses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class SeparateLayers(nn.Module):
    """Layers side by side: by name, (d_in, d_out)."""

    def __init__(self, widths: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        for name, (d_in, d_out) in widths.items():
            parent: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, nn.Linear(d_in, d_out, bias=False, dtype=torch.float64))

    def objective(self, inputs: dict[str, Tensor], output_gradients: dict[str, Tensor]) -> Tensor:
        """Its gradient with respect to each layer's output is the given one."""
        return sum(
            ((self.get_submodule(name)(x) * output_gradients[name]).sum() for name, x in inputs.items()),
            torch.zeros(()).double(),
        )
