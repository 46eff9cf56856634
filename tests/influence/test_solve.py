"""The dual weights against dense systems in the D-dimensional space."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from influence.solve import damped_inverse, damping_strength, dual_weights, identity_weights, response_gram
from tests.influence.brute_force import relative_error

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(0, 1000))


def draw(num_rows: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(num_rows, dim, dtype=torch.float64, generator=generator)
    return G, torch.randn(num_rows, dtype=torch.float64, generator=generator)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.floats(1e-3, 10))
def test_weights_give_the_dense_solution(sizes: tuple[int, int, int], damping: float) -> None:
    G, c = draw(*sizes)
    weights = dual_weights(response_gram(G), c, torch.tensor(damping).double(), exclude_self=False).alpha @ G
    dense = torch.linalg.solve(G.T @ G + damping * torch.eye(sizes[1]), c @ G)
    assert relative_error(weights, dense.expand_as(weights)) < 1e-10


@settings(max_examples=40, deadline=None)
@given(SIZES.filter(lambda sizes: sizes[0] > 1), st.floats(1e-3, 10))
def test_downdate_is_the_smaller_system_solved_anew(sizes: tuple[int, int, int], damping: float) -> None:
    G, c = draw(*sizes)
    alpha = dual_weights(response_gram(G), c, torch.tensor(damping).double(), exclude_self=True).alpha
    assert torch.equal(alpha.diagonal(), torch.zeros(sizes[0]).double())
    for row in range(sizes[0]):
        rest = [r for r in range(sizes[0]) if r != row]
        K = response_gram(G[rest]) + damping * torch.eye(len(rest))
        assert relative_error(alpha[row, rest], torch.linalg.solve(K, c[rest])) < 1e-10


def test_leading_dimensions_are_separate_systems() -> None:
    G = torch.randn(3, 2, 5, 7, dtype=torch.float64)
    c, damping = torch.randn(3, 2, 5, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
    K = response_gram(G)
    together = dual_weights(K, c, damping, exclude_self=True)
    for module in range(3):
        for group in range(2):
            alone = dual_weights(
                K[module, group], c[module, group], damping[module, group], exclude_self=True
            )
            assert relative_error(together.alpha[module, group], alone.alpha) < 1e-12
            assert float(together.effective_dof[module, group]) == pytest.approx(float(alone.effective_dof))


def test_effective_degrees_of_freedom_count_what_the_damping_leaves() -> None:
    G = torch.diag(torch.tensor([3.0, 1.0, 0.1], dtype=torch.float64))
    damping = torch.tensor(0.5, dtype=torch.float64)
    solution = dual_weights(response_gram(G), torch.ones(3).double(), damping, exclude_self=False)
    assert float(solution.effective_dof) == pytest.approx(9 / 9.5 + 1 / 1.5 + 0.01 / 0.51)


def test_a_group_without_gradient_gets_no_weights() -> None:
    zero = torch.zeros(4, 4, dtype=torch.float64)
    for exclude_self in (True, False):
        solution = dual_weights(zero, torch.ones(4).double(), torch.tensor(0.0).double(), exclude_self)
        assert torch.equal(solution.alpha, zero)
        assert not solution.used_floor
        assert float(solution.effective_dof) == 0


def test_a_matrix_that_is_not_positive_definite_is_floored_and_said_so() -> None:
    good = torch.eye(3, dtype=torch.float64)
    # Rounding can turn the Gram matrix of nearly equal rows into this.
    bad = torch.diag(torch.tensor([1.0, 1.0, -1e-13], dtype=torch.float64))
    damping = torch.full((2,), 1e-20, dtype=torch.float64)
    solution = dual_weights(torch.stack([good, bad]), torch.ones(2, 3).double(), damping, exclude_self=False)
    assert solution.used_floor.tolist() == [False, True]
    assert torch.allclose(solution.alpha[0], torch.ones(3, 3).double())
    assert torch.allclose(solution.alpha[1, :, :2], torch.ones(3, 2).double())
    floor = 3 * torch.finfo(torch.float64).eps
    assert solution.alpha[1, :, 2].tolist() == pytest.approx([1 / floor] * 3)


def test_identity_weights_are_the_contrasts() -> None:
    c = torch.tensor([1.0, -2.0, 3.0])
    assert identity_weights(c, exclude_self=False).tolist() == [[1, -2, 3]] * 3
    assert identity_weights(c, exclude_self=True).tolist() == [[0, -2, 3], [1, 0, 3], [1, -2, 0]]


def test_damping_is_relative_to_responses_or_to_dimensions() -> None:
    K = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    num_rows, dim = torch.tensor(3), torch.tensor(12.0)
    assert float(damping_strength(K, num_rows, dim, 0.1, "trace_over_responses")) == pytest.approx(0.2)
    assert float(damping_strength(K, num_rows, dim, 0.1, "trace_over_dim")) == pytest.approx(0.05)


def test_damped_inverse_and_what_is_not_positive_definite() -> None:
    generator = torch.Generator().manual_seed(4)
    G = torch.randn(4, 6, 3, generator=generator, dtype=torch.float64)
    gram = G @ G.mT
    gram[1] = 0.0
    gram[2] -= 2.0 * torch.eye(6, dtype=torch.float64)
    damping = torch.tensor([0.3, 0.0, 0.5, 1e-3], dtype=torch.float64)
    inverse, failed = damped_inverse(gram, damping)
    assert failed.tolist() == [False, False, True, False]
    eye = torch.eye(6, dtype=torch.float64)
    for system in (0, 3):
        torch.testing.assert_close(
            inverse[system] @ (gram[system] + damping[system] * eye), eye, rtol=0, atol=1e-9
        )
    assert not inverse[1].any() and not inverse[2].any()
