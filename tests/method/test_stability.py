"""Stability of a basis, against the definition that builds the m x n matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpc_oialr.linalg.basis_change import gram_products, stability_of
from hpc_oialr.method.decompositions import rotation_stability


def stability(*bases: Tensor) -> float:
    return stability_of(*gram_products(*bases))


def basis(m: int, r: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(m, r, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q


@pytest.mark.parametrize(("r1", "r2"), [(6, 6), (6, 4)])
def test_definition(r1: int, r2: int) -> None:
    U1, V1, U2, V2 = basis(20, r1, 0), basis(12, r1, 1), basis(20, r2, 2), basis(12, r2, 3)
    direct = float(((U1 @ V1.mT) * (U2 @ V2.mT)).sum()) / (r1 * r2) ** 0.5
    assert stability(U1, V1.mT, U2, V2.mT) == pytest.approx(direct, abs=1e-14)


def test_same_basis_is_one_whatever_the_signs() -> None:
    U, V = basis(20, 6, 0), basis(12, 6, 1)
    signs = torch.tensor([1.0, -1, 1, 1, -1, 1], dtype=torch.float64)
    assert stability(U, V.mT, U * signs, (V * signs).mT) == pytest.approx(1.0, abs=1e-14)


def test_unrelated_bases_are_near_zero() -> None:
    agreement = stability(basis(300, 40, 0), basis(300, 40, 1).mT, basis(300, 40, 2), basis(300, 40, 3).mT)
    standard_deviation = 1 / (300 * 300) ** 0.5
    assert abs(agreement) < 5 * standard_deviation


def test_rotation_needs_no_bases() -> None:
    U, V, P, Q = basis(20, 6, 0), basis(12, 6, 1), basis(6, 6, 2), basis(6, 6, 3)
    assert float(rotation_stability(P, Q.mT)) == pytest.approx(stability(U, V.mT, U @ P, Q.mT @ V.mT), abs=1e-14)
