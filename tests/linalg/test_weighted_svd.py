"""The weighted low-rank approximation against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpc_oialr.linalg.svd import SVD, svd
from hpc_oialr.linalg.weighted_svd import DAMPING, weighted_svd

SHAPES = [(12, 12), (20, 9), (9, 20)]


def moments(n: int, seed: int) -> Tensor:
    """Second moments of samples of very unequal features."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(n, n, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * n, n, generator=generator, dtype=torch.float64) @ (mixed * torch.logspace(0, -2, n).double())
    return x.mT @ x / len(x)


def matrix(m: int, n: int) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def product(factors: SVD) -> Tensor:
    return factors.U @ torch.diag(factors.s) @ factors.Vh


def loss(D: Tensor, left: Tensor, right: Tensor) -> float:
    return float(torch.trace(left @ D @ right @ D.mT))


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("sides", ["", "left", "right", "left right"])
def test_orthonormal_descending_and_the_least_loss(m: int, n: int, sides: str) -> None:
    A, r = matrix(m, n), 5
    left = moments(m, 1) if "left" in sides else None
    right = moments(n, 2) if "right" in sides else None
    found, lost = weighted_svd(A, r, left, right)
    torch.testing.assert_close(found.U.mT @ found.U, torch.eye(r, dtype=A.dtype))
    torch.testing.assert_close(found.Vh @ found.Vh.mT, torch.eye(r, dtype=A.dtype))
    assert torch.equal(found.s, found.s.sort(descending=True).values)

    # The definition by symmetric roots instead of Cholesky factors, of the damped moments.
    def root(M: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
        eye = torch.eye(size, dtype=A.dtype)
        values, vectors = torch.linalg.eigh(eye if M is None else M / M.diagonal().mean() + DAMPING * eye)
        return (vectors * values.sqrt()) @ vectors.mT, (vectors / values.sqrt()) @ vectors.mT

    (G, G_inverse), (C, C_inverse) = root(left, m), root(right, n)
    best = G_inverse @ product(svd(G @ A @ C).leading(r)) @ C_inverse
    torch.testing.assert_close(product(found), best)
    cut, whole = (torch.linalg.matrix_norm(G @ D @ C).square() for D in (A - best, A))
    torch.testing.assert_close(lost, cut / whole)


def test_without_moments_it_is_the_truncated_svd() -> None:
    A = matrix(12, 8)
    for nothing in (None, torch.zeros(8, 8, dtype=A.dtype)):
        torch.testing.assert_close(product(weighted_svd(A, 3, None, nothing)[0]), product(svd(A).leading(3)))


def test_output_changes_less_than_by_the_weight_alone() -> None:
    A, left, right = matrix(16, 16), moments(16, 1), moments(16, 2)
    eye = torch.eye(16, dtype=A.dtype)
    plain = product(svd(A).leading(6))
    by_inputs, by_both = (product(weighted_svd(A, 6, side, right)[0]) for side in (None, left))
    assert loss(A - by_inputs, eye, right) < 0.5 * loss(A - plain, eye, right)
    assert loss(A - by_both, left, right) < 0.5 * loss(A - plain, left, right)
    assert loss(A - by_both, left, right) < loss(A - by_inputs, left, right)


def test_features_that_were_never_seen_do_not_break_it() -> None:
    A, right = matrix(10, 10).float(), torch.zeros(10, 10)
    right[:3, :3] = torch.eye(3)
    found, _ = weighted_svd(A, 4, None, right)
    assert all(bool(torch.isfinite(part).all()) for part in found)
    torch.testing.assert_close(product(found)[:, :3], A[:, :3], rtol=0.05, atol=0.05)
