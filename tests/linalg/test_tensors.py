"""Multilinear SVD and HOOI, against TensorLy and by what defines them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorly.decomposition
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_oialr import MultilinearNoiseEdge, hooi, mlsvd
from hpc_oialr.errors import ConfigError, NonFiniteError
from hpc_oialr.linalg.basis_change import orthogonality_error
from hpc_oialr.linalg.tensors import mode_product, unfold


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def planted(shape: tuple[int, ...], r: tuple[int, ...], noise: float) -> torch.Tensor:
    T = random(*r)
    for mode, n in enumerate(shape):
        T = mode_product(T, torch.linalg.qr(random(n, r[mode], seed=mode))[0], mode)
    return T + noise * random(*shape, seed=9)


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=4), seed=st.integers(0, 9))
def test_full_mlsvd_is_the_tensor_with_an_all_orthogonal_core(shape: list[int], seed: int) -> None:
    T = random(*shape, seed=seed)
    found = mlsvd(T)
    torch.testing.assert_close(found.dense(), T, rtol=0, atol=1e-12)
    for mode, (U, s) in enumerate(zip(found.bases, found.spectra, strict=True)):
        assert orthogonality_error(U) < 1e-13
        core = unfold(found.core, mode)
        torch.testing.assert_close(core @ core.mT, s.square().diag(), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("shape", "r"),
    [((12, 15, 18), (2, 3, 4)), ((40, 6, 5), (3, 2, 2)), ((30, 8), (3, 3)), ((6, 7, 8, 5), (2, 1, 3, 2))],
)
@pytest.mark.parametrize("sweeps", [0, 1, 3])
def test_equals_tensorly(shape: tuple[int, ...], r: tuple[int, ...], sweeps: int) -> None:
    T = planted(shape, r, 0.1)
    ours = hooi(T, r, sweeps=sweeps, tolerance=0) if sweeps else mlsvd(T, r)
    core, factors = tensorly.decomposition.tucker(T.numpy(), rank=list(r), n_iter_max=sweeps, tol=0)
    for U, theirs in zip(ours.bases, factors, strict=True):
        np.testing.assert_allclose(U @ U.mT, theirs @ theirs.T, rtol=0, atol=1e-9)
    np.testing.assert_allclose(ours.dense(), tensorly.tucker_to_tensor((core, factors)), rtol=0, atol=1e-9)


def test_hooi_converges_to_a_better_fit_than_mlsvd() -> None:
    T = planted((20, 24, 28), (2, 3, 2), 0.25)
    start = mlsvd(T)
    truncated, found = mlsvd(T, (2, 3, 2)), hooi(T, (2, 3, 2), tolerance=1e-10, sweeps=200)
    assert 1 < found.sweeps < 200
    assert found.core.norm() > truncated.core.norm() * 1.001
    # Of an orthogonal projection the error is what the core lacks of the norm.
    torch.testing.assert_close((T - found.dense()).square().sum(), T.square().sum() - found.core.square().sum())
    more = hooi(T, (2, 3, 2), start=found, sweeps=1)
    assert more.core.norm() / found.core.norm() - 1 < 1e-9
    torch.testing.assert_close(hooi(T, (2, 3, 2), start=start).dense(), hooi(T, (2, 3, 2)).dense(), rtol=0, atol=1e-10)


def test_exact_low_rank_is_found_in_one_sweep_in_short_dtypes_by_fp32() -> None:
    T = planted((9, 10, 11), (2, 2, 3), 0.0)
    found = hooi(T, (2, 2, 3))
    assert found.sweeps == 1
    torch.testing.assert_close(found.dense(), T, rtol=0, atol=1e-12)
    short = hooi(T.bfloat16(), (2, 2, 3))
    assert {part.dtype for part in (short.core, *short.bases, *short.spectra)} == {torch.float32}
    torch.testing.assert_close(short.dense(), T.float(), rtol=0, atol=0.02)


def test_the_noise_edge_chooses_the_core_and_finds_nothing_in_noise() -> None:
    shape = (40, 50, 60)
    # Strengths of 32 and 16 in units of the detection threshold.
    T = random(*shape)
    for rho, seed in ((32, 1), (16, 2)):
        u, v, w = (torch.nn.functional.normalize(random(n, seed=10 * seed + n), dim=0) for n in shape)
        T = T + (rho * math.prod(shape) ** 0.5) ** 0.5 * torch.einsum("i,j,k->ijk", u, v, w)
    rule = MultilinearNoiseEdge()
    assert hooi(T, rule).core.shape == mlsvd(7 * T, rule).core.shape == (2, 2, 2)
    for nothing in (hooi(random(*shape), rule), mlsvd(random(*shape), rule)):
        assert nothing.core.shape == (0, 0, 0)
        assert torch.equal(nothing.dense(), torch.zeros(shape, dtype=torch.float64))


def test_refuses_what_cannot_be_done() -> None:
    T = random(4, 5, 6)
    for r in ((1, 2), (5, 1, 1), (-1, 1, 1)):
        with pytest.raises(ConfigError, match=r"r is .*must be a size for each mode, at most \(4, 5, 6\)"):
            mlsvd(T, r)
    with pytest.raises(ConfigError, match=r"r\[2\] is 5; must be at most the product of the others, 4\."):
        hooi(T, (2, 2, 5))
    with pytest.raises(ConfigError, match="sweeps is 0; must be at least 1"):
        hooi(T, (1, 1, 1), sweeps=0)
    with pytest.raises(ConfigError, match=r"start is \(4, 5, 7\); must be of shape \(4, 5, 6\)"):
        hooi(T, (1, 1, 1), start=mlsvd(random(4, 5, 7)))
    with pytest.raises(ConfigError, match=r"start.core is \(1, 1, 1\); must be at least \(2, 2, 2\)"):
        hooi(T, (2, 2, 2), start=mlsvd(T, (1, 1, 1)))
    with pytest.raises(ConfigError, match=r"gains is \(3,\); must have at least two modes"):
        mlsvd(torch.ones(3), name="gains")
    T[1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="kernel holds 1 NaN or Inf among 120 values"):
        mlsvd(T, name="kernel")
