"""What two SVDs tell of each other, against scipy and NumPy on whole matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from hpc_oialr.linalg.basis_change import (
    angles_of,
    basis_change,
    smallest_cosines,
    smallest_cosines_batched,
    triangular_factor,
)
from hpc_oialr.linalg.svd import SVD, svd

SHAPES = [(30, 12), (12, 30), (16, 16), (5, 1)]


def weights(m: int, n: int, *, turned: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a later one."""
    generator = torch.Generator().manual_seed(m * n)
    first, step = (torch.randn(m, n, generator=generator, dtype=torch.float64) for _ in range(2))
    return first, first + turned * step


def numpy_r(W: torch.Tensor) -> np.ndarray:
    R = np.linalg.qr(W.numpy())[1]
    return np.where(np.diagonal(R) < 0, -1, 1)[:, None] * R


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_against_scipy_and_numpy(m: int, n: int) -> None:
    first, second = weights(m, n)
    change = basis_change(svd(first), svd(second))
    (U1, _, Vh1), (U2, _, Vh2) = (np.linalg.svd(W.numpy(), full_matrices=False) for W in (first, second))
    k = min(m, n)
    d = math.ceil(k / 4)
    assert change.stability == pytest.approx(np.sum((U1 @ Vh1) * (U2 @ Vh2)) / k, abs=1e-12)
    angles = [scipy.linalg.subspace_angles(*pair).max() for pair in ((U1[:, :d], U2[:, :d]), (Vh1[:d].T, Vh2[:d].T))]
    assert [change.angle_U, change.angle_Vh] == pytest.approx(angles, abs=1e-7)
    R1, R2 = numpy_r(first), numpy_r(second)
    assert change.r_distance == pytest.approx(np.linalg.norm(R2 - R1) / np.linalg.norm(R1), abs=1e-12)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_r_without_u_is_that_of_the_weight(m: int, n: int) -> None:
    W, _ = weights(m, n)
    _, s, Vh = svd(W)
    R = triangular_factor(s, Vh)
    assert R.diagonal().min() > 0
    np.testing.assert_allclose(R, numpy_r(W), atol=1e-12)


def test_signs_of_singular_vectors_do_not_matter() -> None:
    first, second = (svd(W) for W in weights(20, 8))
    signs = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    flipped = SVD(second.U * signs, second.s, signs[:, None] * second.Vh)
    assert basis_change(first, flipped) == pytest.approx(basis_change(first, second), abs=1e-7)


def test_nothing_has_changed() -> None:
    W = svd(weights(24, 16)[0])
    change = basis_change(W, W)
    assert change.stability == pytest.approx(1, abs=1e-12)
    assert max(change.angle_U, change.angle_Vh) < 1e-6
    assert change.r_distance == 0


def test_float32_hides_small_angles_only() -> None:
    first, second = (svd(W.float()) for W in weights(40, 20))
    exact = basis_change(*(svd(W) for W in weights(40, 20)))
    assert basis_change(first, second) == pytest.approx(exact, rel=1e-3)
    assert basis_change(first, first).angle_U < 2e-3


def test_a_weight_of_zeros_has_no_relative_distance() -> None:
    zeros = svd(torch.zeros(6, 4))
    assert math.isnan(basis_change(zeros, zeros).r_distance)


def test_a_known_angle() -> None:
    turn = torch.eye(8, dtype=torch.float64)
    c, s = math.cos(0.4), math.sin(0.4)
    # Within the leading two vectors nothing is lost, from the second to the third there is.
    turn[1, 1], turn[1, 2], turn[2, 1], turn[2, 2] = c, -s, s, c
    cosines = smallest_cosines(turn, torch.eye(8, dtype=torch.float64))
    assert angles_of(cosines) == pytest.approx([0.4, 0])


def test_rotated_factors() -> None:
    generator = torch.Generator().manual_seed(3)
    P, Qh, U, V = (
        torch.linalg.qr(torch.randn(m, 8, generator=generator, dtype=torch.float64))[0] for m in (8, 8, 20, 12)
    )
    pairs = ((U, U @ P), (V, (Qh @ V.mT).mT))
    expected = [scipy.linalg.subspace_angles(A[:, :2].numpy(), B[:, :2].numpy()).max() for A, B in pairs]
    assert angles_of(smallest_cosines(P, Qh.mT)) == pytest.approx(expected, abs=1e-7)


def test_many_angles_at_once() -> None:
    """Without a decomposition, of unequal sizes; none, small, large ones, and the largest possible."""
    generator = torch.Generator().manual_seed(4)
    turns = [torch.eye(r, dtype=torch.float64) for r in (1, 5, 8)] + [torch.eye(8).flip(0).double()]
    for r, size in [(2, 1.0), (8, 1e-4), (8, 0.1), (40, 1.0), (40, 1e-3)]:
        skew = size * torch.randn(r, r, generator=generator, dtype=torch.float64)
        turns.append(torch.linalg.matrix_exp(skew - skew.mT))
    exact = [angle for turn in turns for angle in angles_of(smallest_cosines(turn))]
    found = angles_of(torch.stack(smallest_cosines_batched(turns)))
    # Errors of 1e-6 in the square of the sine show where the cosine is near 0.
    assert found == pytest.approx(exact, abs=1e-3)
    small = [i for i, angle in enumerate(exact) if angle < 0.5]
    assert [found[i] for i in small] == pytest.approx([exact[i] for i in small], rel=1e-5, abs=1e-12)
    assert len(small) == 6
    assert max(exact) == pytest.approx(math.pi / 2)
