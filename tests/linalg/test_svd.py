"""The SVD's chain of fall-backs, and what it says when it gives up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_oialr.errors import NonFiniteError
from hpc_oialr.linalg.basis_change import orthogonality_error
from hpc_oialr.linalg.svd import _attempts, svd, svds


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 24), n=st.integers(1, 24), seed=st.integers(0, 9))
def test_reproduces_the_matrix(m: int, n: int, seed: int) -> None:
    A = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    U, s, Vh = svd(A)
    assert (U.shape, s.shape, Vh.shape) == ((m, min(m, n)), (min(m, n),), (min(m, n), n))
    torch.testing.assert_close(U @ torch.diag(s) @ Vh, A, rtol=0, atol=1e-12)
    assert orthogonality_error(U) < 1e-13
    assert orthogonality_error(Vh.mT) < 1e-13


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_dtypes_are_computed_in_fp32(dtype: torch.dtype) -> None:
    A = torch.randn(6, 4).to(dtype)
    assert {part.dtype for part in svd(A)} == {torch.float32}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_names_the_layer(bad: float) -> None:
    A = torch.randn(5, 3)
    A[2, 1] = bad
    with pytest.raises(NonFiniteError, match=r"encoder\.3\.fc1 holds 1 NaN or Inf among 15 values"):
        svd(A, name="encoder.3.fc1")


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_falls_back_then_gives_up(monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    original, calls = torch.linalg.svd, []

    def flaky(A: torch.Tensor, **options: bool) -> object:
        calls.append((A.dtype, tuple(A.shape)))
        if len(calls) <= failures:
            raise torch.linalg.LinAlgError("did not converge")
        return original(A, **options)

    A = torch.randn(5, 3)
    monkeypatch.setattr(torch.linalg, "svd", flaky)
    if failures == 3:
        with pytest.raises(NonFiniteError, match=r"no SVD of W \(5 x 3\) converged"):
            svd(A, name="W")
    else:
        U, s, Vh = svd(A)
        torch.testing.assert_close(U @ torch.diag(s) @ Vh, A)
        assert U.dtype == torch.float32
    expected = [(torch.float32, (5, 3)), (torch.float64, (5, 3)), (torch.float64, (3, 5))]
    assert calls == expected[: min(failures + 1, 3)]


def test_chain_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls a CUDA tensor would see, recorded on a CPU."""
    calls = []

    def record(A: torch.Tensor, **options: object) -> object:
        calls.append((A.dtype, tuple(A.shape), options.get("driver")))
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", record)
    for attempt in _attempts(torch.randn(5, 3), on_gpu=True):
        with pytest.raises(torch.linalg.LinAlgError):
            attempt()
    single, double = torch.float32, torch.float64
    assert calls[:2] == [(single, (5, 3), "gesvdj"), (single, (5, 3), "gesvd")]
    assert calls[2:] == [(double, (5, 3), None), (double, (3, 5), None)]


@pytest.mark.parametrize("converges", [True, False])
def test_a_batch_is_one_call_on_a_gpu_and_a_loop_where_it_fails(
    monkeypatch: pytest.MonkeyPatch, converges: bool
) -> None:
    matrices = [torch.randn(6, 4) for _ in range(3)]
    alone = [svd(A) for A in matrices]
    original, calls = torch.linalg.svd, []

    def recorded(A: torch.Tensor, **options: object) -> object:
        calls.append(tuple(A.shape))
        if A.dim() == 3 and not converges:
            raise torch.linalg.LinAlgError("did not converge")
        return original(A, full_matrices=False)

    monkeypatch.setattr(torch.linalg, "svd", recorded)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    found = list(svds(matrices, "abc"))
    assert calls == [(3, 6, 4), *([] if converges else [(6, 4)] * 3)]
    for ours, theirs in zip(found, alone, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
