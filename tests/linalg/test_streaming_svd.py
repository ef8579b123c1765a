"""The streamed SVD against LAPACK's and the randomized one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_oialr.errors import ConfigError, NonFiniteError
from hpc_oialr.linalg.streaming_svd import streaming_svd


def matrix(m: int, n: int, decay: float = 0.95) -> torch.Tensor:
    A = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(m))
    return A * decay ** torch.arange(n)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.integers(0, 90), min_size=1, max_size=9), r=st.integers(1, 7), extra=st.integers(0, 6))
def test_any_blocks_within_the_error_it_states(rows: list[int], r: int, extra: int) -> None:
    A = matrix(sum(rows) + 1, 12, 0.6)
    found = streaming_svd(A.split([*rows, 1]), r=r, oversampling=extra)
    U = torch.cat(list(found.left(A.split(7))))
    residual = A - (U * found.s) @ found.Vh
    assert found.rows == len(A)
    assert residual.norm() <= found.error * (1 + 1e-9) + 1e-12
    eye = torch.eye(len(found.s), dtype=torch.float64)
    torch.testing.assert_close(found.Vh @ found.Vh.mT, eye, rtol=0, atol=1e-12)
    exact = torch.linalg.svdvals(A)
    assert residual.norm() >= exact[r:].norm() * (1 - 1e-9) - 1e-12
    assert (found.s <= exact[:r] * (1 + 1e-12)).all()
    if r + extra >= min(len(A), 12):
        torch.testing.assert_close(found.s, exact[:r], rtol=1e-9, atol=1e-12)


def test_close_to_the_best_and_to_the_randomized_svd_on_a_slow_spectrum() -> None:
    A, r = matrix(3000, 200), 10
    found = streaming_svd(A.split(50), r=r)
    short = streaming_svd(A.float().split(50), r=r)
    assert short.Vh.dtype == torch.float32
    torch.testing.assert_close(short.s.double(), found.s, rtol=1e-6, atol=0)
    assert short.error == pytest.approx(found.error, rel=1e-6)
    best = torch.linalg.svdvals(A)[r:].norm()
    ours = (A - A @ found.Vh.mT @ found.Vh).norm() / best
    torch.manual_seed(0)
    V = torch.svd_lowrank(A, q=r + 10, niter=2)[2][:, :r]
    theirs = (A - A @ V @ V.mT).norm() / best
    assert 1 <= ours < 1.01
    assert ours < theirs * 1.01


def test_a_matrix_of_lower_rank_than_wanted_has_columns_of_zeros() -> None:
    found = streaming_svd([torch.ones(4, 3)], r=2)
    assert found.s[0] == pytest.approx(12**0.5)
    torch.testing.assert_close(
        torch.cat(list(found.left([torch.ones(4, 3)]))),
        torch.tensor([[0.5, 0.0]] * 4).abs() * torch.sign(found.Vh[0, 0]),
    )


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="r must be at least 1"):
        streaming_svd([torch.ones(2, 2)], r=0)
    with pytest.raises(ConfigError, match=r"matrix is 'empty'.*An iterator can be used once"):
        streaming_svd(iter(()), r=1)
    with pytest.raises(ConfigError, match=r"w is \(2, 3\); must have two axes, and as many columns"):
        streaming_svd([torch.ones(2, 2), torch.ones(2, 3)], r=1, name="w")
    with pytest.raises(NonFiniteError, match="w holds 1 NaN or Inf in rows 11 to 11"):
        streaming_svd([torch.ones(11, 2), torch.tensor([[1.0, float("nan")]])], r=1, name="w")
