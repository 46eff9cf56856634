"""The tracer's options: the `influence:` section of a preset, checked. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, Final

CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "objective": ("log_prob_advantage", "log_prob", "training_loss"),
    "contrast": ("none", "accepted_minus_rejected", "advantage", "mean_ratio"),
    "scope": ("per_prompt", "batch"),
    "hessian": ("response", "identity", "token"),
    "damping_mode": ("trace_over_responses", "trace_over_dim"),
    "positions": ("response", "all"),
    "capture": ("auto", "fused", "shared", "separate"),
}
"""The values of every option that is a choice, the default first."""

ALIASES: Final[Mapping[tuple[str, str], str]] = {("hessian", "inverse"): "response"}

DEFAULT_MODULES: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class TracerConfigError(ValueError):
    """An option that does not exist, or a value it cannot have; the message lists what is valid."""


class InfluenceWarning(UserWarning):
    """The settings are valid, yet the scores may not mean what one would expect."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracerConfig:
    """What to trace, and by which definition of influence.

    For a linear layer, position t of response r has the projected gradient ``g_t = u_t v_t^T``, and a
    response the sum ``G_r`` of those of its positions. A group of responses is compared: with contrast
    ``c_r``, direction ``d = sum_r c_r G_r`` and curvature ``H``, the score of t is ``<H^-1 d, g_t>``,
    summed over the layers.

    Raises TracerConfigError for a value that an option cannot have.
    """

    objective: str = "log_prob_advantage"
    """What is differentiated, formed by the caller: ``sum_t A_t log pi_t``, without A for ``log_prob``, or
    for ``training_loss`` the loss itself, which training makes smaller where it makes the others larger."""

    contrast: str = "none"
    """What c_r is, passed by the caller: 1 for all, +1/-1 for accepted/rejected, the advantage, or for
    ``mean_ratio`` the mean over the response's tokens of pi / pi_old, which is 1 on policy."""

    accepted_above: float = 0.0
    """A response is accepted when its reward is greater than this."""

    scope: str = "per_prompt"
    """Which responses are one group: those to one prompt, or the whole batch."""

    hessian: str = "response"
    """``H = sum_r vec(G_r) vec(G_r)^T + lambda I`` (``response``, alias ``inverse``), ``H = I``, or for
    ``token`` ``H = sum_t vec(g_t) vec(g_t)^T + lambda I`` over the positions of the group's responses."""

    damping: float = 0.1
    """lambda relative to the scale that `damping_mode` names; greater than 0."""

    damping_mode: str = "trace_over_responses"
    """lambda = damping x tr(K)/R, with K the Gram matrix of the R responses' G_r (whatever `hessian` is), or
    damping x tr(H)/D, with H before damping. Under ``response`` the latter is so small that in each
    layer with D well above R, without `exclude_self`, the layer's part of a response's scores adds up to the
    response's own contrast, which says nothing new of its tokens."""

    exclude_self: bool = True
    """Leave the response that is scored out of direction and curvature (lambda stays the whole group's)."""

    positions: str = "response"
    """What the caller marks in row_ids: the positions that predict the response's tokens, or for ``all`` the
    prompt's too; what flows through positions that are not marked is no part of G_r."""

    projection_dim_factor: int = 256
    """A divisor, not a rank: a width is projected to ``max(1, width // factor)`` numbers."""

    max_hessian_dim: int = 2500
    """The largest D for which a D x D matrix is formed, which ``hessian=token`` does for every module: where
    k_in k_out would be more, the widths shrink, with a warning. The others form no such matrix."""

    max_tokens_per_response: int = -1
    """-1: every token; n: at most n evenly spaced tokens of a response, and nothing of the others."""

    modules: tuple[str, ...] = DEFAULT_MODULES
    """Names of linear layers, whole or from a dot on (``q_proj``, ``0.mlp.up_proj``); ``*``, ``?`` too."""

    capture: str = "auto"
    """How a training loop with a loss of its own gets at the objective's gradients; `capture()` takes any
    backward that runs inside it. ``fused``: from the loss's own backward, where its gradient is the
    objective's times a factor for each row; ``shared``: by a second backward over the loss's forward;
    ``separate``: by a forward and a backward of its own; ``auto``: ``fused`` where exact, else another."""

    profile_timing: bool = True
    """Measure the phases of `pop_rows` and the captures."""

    seed: int = 0
    """Seed of the projections."""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = ALIASES.get((name, str(getattr(self, name))), getattr(self, name))
            if value not in choices:
                raise TracerConfigError(_bad_choice(name, value, choices))
            object.__setattr__(self, name, value)
        for name in ("exclude_self", "profile_timing"):
            if not isinstance(getattr(self, name), bool):
                raise TracerConfigError(_bad_value(name, getattr(self, name), "true or false"))
        for name in ("accepted_above", "damping"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
                raise TracerConfigError(_bad_value(name, value, "a finite number"))
            object.__setattr__(self, name, float(value))
        if self.damping <= 0:
            raise TracerConfigError(
                _bad_value("damping", self.damping, "greater than 0, or the curvature has no inverse")
            )
        for name, least in (("projection_dim_factor", 1), ("max_hessian_dim", 1), ("seed", 0)):
            value = getattr(self, name)
            if not _is_int(value) or value < least:
                raise TracerConfigError(_bad_value(name, value, f"a whole number, at least {least}"))
        cap = self.max_tokens_per_response
        if not _is_int(cap) or (cap != -1 and cap < 1):
            raise TracerConfigError(
                _bad_value("max_tokens_per_response", cap, "-1 (all), or a whole number, at least 1")
            )
        object.__setattr__(self, "modules", _module_patterns(self.modules))

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> TracerConfig:
        """Build from a preset's section; options left out keep their defaults.

        Raises TracerConfigError for an unknown option, naming the nearest one and listing all.
        """
        if not isinstance(options, Mapping):
            raise TracerConfigError(f"influence: {options!r} is not valid; expected options with values")
        names = [field.name for field in fields(cls)]
        for name in options:
            if name not in names:
                raise TracerConfigError(
                    f"influence.{name}: no such option{_nearest(str(name), names)}; valid: {', '.join(names)}"
                )
        return cls(**options)

    def to_mapping(self) -> dict[str, Any]:
        """The options as plain values that JSON and YAML can hold; `from_mapping` reads them back."""
        return {**asdict(self), "modules": list(self.modules)}

    @classmethod
    def reference_run(cls) -> TracerConfig:
        """The semantics of the run that this engine is compared with, ``infl-alltoken-timing-0221``.

        They are kept to reproduce its scores, not recommended: its damping is so small that scores
        interpolate (see `damping_mode`), and it counts the advantage's sign twice.
        """
        return cls(
            objective="log_prob_advantage",
            contrast="accepted_minus_rejected",
            scope="per_prompt",
            hessian="response",
            damping=0.1,
            damping_mode="trace_over_dim",
            exclude_self=False,
            positions="response",
            projection_dim_factor=256,
            max_hessian_dim=2500,
            max_tokens_per_response=-1,
        )

    @property
    def dim_limit(self) -> int | None:
        """The most numbers of a projected gradient; None: any, since no D x D matrix is formed."""
        return self.max_hessian_dim if self.hessian == "token" else None

    @property
    def counts_advantage_sign_twice(self) -> bool:
        """The objective carries the advantage's sign, and so does the contrast.

        Then a rejected response's gradients, already turned around by its negative advantage, are turned
        around once more, and good and bad responses pull in the same direction.
        """
        return self.objective != "log_prob" and self.contrast in ("accepted_minus_rejected", "advantage")


def _module_patterns(value: object) -> tuple[str, ...]:
    patterns = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else ()
    if not patterns or not all(isinstance(p, str) and p for p in patterns):
        raise TracerConfigError(_bad_value("modules", value, "a list with at least one name or pattern"))
    return patterns


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    aliases = [f"{alias} (= {target})" for (option, alias), target in ALIASES.items() if option == name]
    valid = ", ".join([*choices, *aliases])
    return f"influence.{name}: no such value {value!r}{_nearest(str(value), choices)}; valid: {valid}"


def _bad_value(name: str, value: object, expected: str) -> str:
    return f"influence.{name}: {value!r} is not valid; expected {expected}"


def _nearest(word: str, words: Iterable[str]) -> str:
    near = get_close_matches(word, list(words), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
