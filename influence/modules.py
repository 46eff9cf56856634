"""The linear layers that are traced: found by pattern, each with its projections."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from influence.config import TracerConfig, TracerConfigError
from influence.projection import Side, canonical_name, projected_widths, projection_signs


@dataclass(frozen=True, slots=True, eq=False)
class TracedModule:
    """One linear layer. The projections are kept as signs: exact in every type, also in bfloat16.

    ``P = signs / sqrt(k)``; the factor of both sides together (`influence.layout.ModulePlace.scale`) goes
    into the gradients of responses and into the weights of the scores, where sums are in float32.
    """

    name: str
    """Canonical: without wrapper prefixes."""
    module: nn.Linear
    k_in: int
    k_out: int
    seed: int
    _signs: dict[tuple[Side, torch.device, torch.dtype], Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(k_out, k_in)."""
        return self.k_out, self.k_in

    def signs(self, side: Side, device: torch.device, dtype: torch.dtype) -> Tensor:
        """+1/-1 [k, width], made once for a device and a type; never a buffer of the model."""
        key = (side, device, dtype)
        if key not in self._signs:
            width, k = self.width(side), (self.k_in if side == "in" else self.k_out)
            signs = torch.from_numpy(projection_signs(self.name, side, width, k, self.seed))
            self._signs[key] = signs.to(device=device, dtype=dtype)
        return self._signs[key]

    def width(self, side: Side) -> int:
        return self.module.in_features if side == "in" else self.module.out_features


def find_modules(model: nn.Module, config: TracerConfig) -> tuple[list[TracedModule], list[str]]:
    """The linear layers that `config.modules` names, and the names of those projected narrower than asked.

    A pattern matches a whole canonical name or its end from a dot on. Layers whose weight is frozen have no
    gradient to trace and are left out.

    Raises TracerConfigError where a pattern matches no linear layer with a trainable weight, and where two
    layers have one canonical name.
    """
    # A wrapper and the layer inside it share a canonical name; named_modules lists the inner one later.
    found = {canonical_name(path): (path, module) for path, module in model.named_modules() if path}
    named = {name: module for name, (_, module) in found.items()}
    linears = {name: module for name, module in named.items() if isinstance(module, nn.Linear)}
    chosen: dict[str, nn.Linear] = {}
    for pattern in config.modules:
        matched = {name: linear for name, linear in linears.items() if _matches(name, pattern)}
        trainable = {name: linear for name, linear in matched.items() if _is_trainable(linear)}
        if not trainable:
            raise TracerConfigError(_why_nothing_matches(pattern, matched, named, linears))
        chosen |= trainable
    for path, module in model.named_modules():
        name = canonical_name(path)
        if name in chosen and isinstance(module, nn.Linear) and not found[name][0].startswith(path):
            raise TracerConfigError(
                f"influence.modules: {path} and {found[name][0]} are both {name} without the names that "
                "wrappers add, and a projection goes by that name; rename one"
            )
    traced, narrowed = [], []
    for name, linear in linears.items():
        if name in chosen:
            d_in, d_out, factor = linear.in_features, linear.out_features, config.projection_dim_factor
            k_in, k_out = projected_widths(d_in, d_out, factor, config.dim_limit)
            if (k_in, k_out) != (max(1, d_in // factor), max(1, d_out // factor)):
                narrowed.append(name)
            traced.append(TracedModule(name, linear, k_in, k_out, config.seed))
    return traced, narrowed


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _is_trainable(linear: nn.Linear) -> bool:
    # A sharding wrapper may have put a plain tensor in the parameter's place; that says nothing.
    return not isinstance(linear.weight, nn.Parameter) or linear.weight.requires_grad


def _why_nothing_matches(
    pattern: str, matched: Iterable[str], named: Iterable[str], linears: Iterable[str]
) -> str:
    what = f"influence.modules: {pattern!r}"
    frozen = list(matched)
    if frozen:
        return (
            f"{what} matches only layers with frozen weights, such as {frozen[0]}, which have no gradient to "
            "trace; under LoRA name the adapters instead: 'lora_A.*', 'lora_B.*'"
        )
    others = [name for name in named if _matches(name, pattern)]
    if others:
        return f"{what} matches no nn.Linear; {others[0]} is another kind of module, which is not supported"
    endings = sorted({name.rpartition(".")[2] for name in linears})
    near = get_close_matches(pattern, [*endings, *linears], n=3)
    hint = f"near: {', '.join(near)}" if near else f"the model's linear layers end in: {', '.join(endings)}"
    return f"{what} matches no layer of the model; {hint}"
