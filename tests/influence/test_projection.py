from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from influence.projection import canonical_name, projected_widths, projection_matrix, projection_signs

NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "wrapped",
    [
        "model.layers.0.self_attn.q_proj.base_layer",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer",
        "module.model.layers.0.self_attn.q_proj",
        "_orig_mod.model.layers.0.self_attn.q_proj",
        "module._orig_mod._fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.self_attn.q_proj",
        "model.layers.0._checkpoint_wrapped_module.self_attn.q_proj",
        "_fsdp_wrapped_module.base_model.model.model.layers.0.self_attn.q_proj",
    ],
)
def test_wrappers_do_not_change_name_or_projection(wrapped: str) -> None:
    assert canonical_name(wrapped) == NAME
    assert torch.equal(projection_matrix(wrapped, "in", 40, 5, 3), projection_matrix(NAME, "in", 40, 5, 3))


def test_adapters_keep_their_own_names() -> None:
    assert canonical_name(f"base_model.model.{NAME}.lora_A.default") == f"{NAME}.lora_A.default"
    assert canonical_name("model.module_list.0.module") == "model.module_list.0.module"


def test_golden_signs() -> None:
    # Pinned: a change here changes every score that was ever traced.
    signs = projection_signs(NAME, "in", 12, 3, seed=0)
    assert ["".join("+" if s > 0 else "-" for s in row) for row in signs] == [
        "+---+-++-+++",
        "--+-+-++++--",
        "+++++-+++-+-",
    ]
    digest = hashlib.sha256(projection_signs(NAME, "out", 1536, 6, seed=7).tobytes()).hexdigest()
    assert digest == "417dbe59f1315970e476b8ea161c7fd066ced801138987fb8faff12d6eacce32"


def test_entries_are_signs_over_root_k() -> None:
    matrix = projection_matrix(NAME, "out", 50, 4, seed=1)
    assert matrix.shape == (4, 50)
    assert matrix.dtype == torch.float64
    assert set(matrix.flatten().tolist()) == {0.5, -0.5}


def test_seed_name_and_side_each_give_another_matrix() -> None:
    variants = [(NAME, "in", 0), (NAME, "out", 0), (NAME, "in", 1), (f"{NAME}2", "in", 0)]
    drawn = {projection_signs(name, side, 64, 4, seed).tobytes() for name, side, seed in variants}
    assert len(drawn) == len(variants)


def test_signs_are_balanced_and_uncorrelated() -> None:
    signs = projection_signs(NAME, "in", 4096, 64, seed=0).astype(np.float64)
    num_signs = signs.size
    # Five standard deviations of a fair coin, and of the mean of products of two.
    assert abs(signs.mean()) < 5 / num_signs**0.5
    between_rows = signs @ signs.T / signs.shape[1]
    assert np.abs(between_rows - np.eye(64)).max() < 5.5 / signs.shape[1] ** 0.5
    neighbours = (signs[:, :-1] * signs[:, 1:]).mean()
    assert abs(neighbours) < 5 / num_signs**0.5


def test_inner_products_are_kept_with_the_variance_of_a_sign_projection() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 30, dtype=torch.float64, generator=generator)
    k, num_seeds = 8, 3000
    matrices = torch.stack([projection_matrix(NAME, "in", 30, k, seed) for seed in range(num_seeds)])
    products = ((matrices @ x) * (matrices @ y)).sum(-1)
    # Var[<Px, Py>] = (|x|^2 |y|^2 + <x, y>^2 - 2 sum x_i^2 y_i^2) / k
    variance = float(((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 @ y**2)) / k)
    assert float(products.mean()) == pytest.approx(float(x @ y), abs=5 * (variance / num_seeds) ** 0.5)
    assert float(products.var()) == pytest.approx(variance, rel=0.15)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20000), st.integers(1, 20000), st.integers(1, 300), st.integers(1, 3000))
def test_widths_stay_within_the_largest_dimension(d_in: int, d_out: int, factor: int, most: int) -> None:
    k_in, k_out = projected_widths(d_in, d_out, factor, most)
    wanted = max(1, d_in // factor), max(1, d_out // factor)
    assert k_in >= 1
    assert k_out >= 1
    assert k_in * k_out <= most
    assert k_in <= wanted[0]
    assert k_out <= wanted[1]
    if wanted[0] * wanted[1] <= most:
        assert (k_in, k_out) == wanted


def test_widths_of_a_qwen2_1_5b() -> None:
    widths = {
        "q, o": projected_widths(1536, 1536, 256, 2500),
        "k, v": projected_widths(1536, 256, 256, 2500),
        "gate, up": projected_widths(1536, 8960, 256, 2500),
        "down": projected_widths(8960, 1536, 256, 2500),
    }
    assert widths == {"q, o": (6, 6), "k, v": (6, 1), "gate, up": (6, 35), "down": (35, 6)}
    assert projected_widths(1536, 8960, 16, 2500) == (20, 120)
