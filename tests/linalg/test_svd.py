"""The SVD's chain of fall-backs, and what it says when it gives up."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_oialr.errors import NonFiniteError
from hpc_oialr.linalg import gram_svd
from hpc_oialr.linalg import svd as svd_module
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chain_of_a_gpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The calls a CUDA tensor would see, recorded on a CPU."""
    calls = []

    def record(A: torch.Tensor, **options: object) -> object:
        calls.append((A.dtype, tuple(A.shape), options.get("driver")))
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", record)
    monkeypatch.setattr(torch.linalg, "eigh", record)
    for attempt in _attempts(torch.randn(5, 3, dtype=dtype), on_gpu=True):
        with pytest.raises(torch.linalg.LinAlgError):
            attempt()
    double = torch.float64
    # Squares of float64 values lose half the digits. (The tensor is on a CPU, where gesvda has no name.)
    expected = [(double, (1, 5, 3), None), (double, (1, 3, 3), None)] if dtype == torch.float32 else []
    expected += [(dtype, (5, 3), "gesvdj"), (dtype, (5, 3), "gesvd")]
    assert calls == [*expected, (double, (5, 3), None), (double, (3, 5), None)]


@pytest.mark.parametrize(("noise", "drivers"), [(0.0, ["gesvdj"]), (1e-4, ["gesvdj", "gesvd"])])
def test_what_gesvdj_leaves_unorthonormal_is_computed_by_gesvd(
    monkeypatch: pytest.MonkeyPatch, noise: float, drivers: list[str]
) -> None:
    A, made, driver_of = torch.randn(40, 30), [], torch.linalg.svd

    def recorded(A: torch.Tensor, full_matrices: bool, driver: str) -> object:
        made.append(driver)
        U, s, Vh = driver_of(A, full_matrices=full_matrices)
        return U, s, Vh + noise * (driver == "gesvdj")

    def no_gram_matrix(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(svd_module, "gram_svd", no_gram_matrix)
    monkeypatch.setattr(torch.linalg, "svd", recorded)
    monkeypatch.setattr(svd_module, "bytes_below_peak", lambda _: 1 << 40)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    found = svd(A, careful=False)
    assert made == drivers
    assert torch.allclose(found.U * found.s @ found.Vh, A, atol=1e-5)


@pytest.mark.parametrize("failing", ["none", "one", "all"])
@pytest.mark.parametrize("careful", [False, True])
def test_a_batch_is_one_call_on_a_gpu_and_what_fails_goes_to_the_drivers(
    monkeypatch: pytest.MonkeyPatch, failing: str, careful: bool
) -> None:
    matrices = [torch.randn(6, 4) for _ in range(3)]
    expected = [svd(A) for A in matrices]
    original, calls = gram_svd._right_vectors, []

    def recorded(B: torch.Tensor, form: gram_svd.Form) -> torch.Tensor:
        calls.append((len(B), form))
        if failing == "all":
            raise torch.linalg.LinAlgError("did not converge")
        V = original(B, "eigh")
        if failing == "one":
            V[-1, 0] += 1e-3
        return V

    driver = torch.linalg.svd
    monkeypatch.setattr(gram_svd, "_right_vectors", recorded)
    monkeypatch.setattr(torch.linalg, "svd", lambda A, **_: driver(A, full_matrices=False))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    found = svds(matrices, "abc", careful=careful)
    alone = [(1, "gesvda"), (1, "eigh")]
    again = {"none": [], "one": alone if careful else [], "all": [(3, "eigh"), *alone * 3]}[failing]
    assert calls == [(3, "gesvda"), *again]
    if failing == "one" and not careful:
        assert found.pop().s.isnan().all(), "the caller's check must fail"
    for ours, theirs in zip(found, expected, strict=False):
        torch.testing.assert_close(ours.s, theirs.s)
        torch.testing.assert_close(ours.U * ours.s @ ours.Vh, theirs.U * theirs.s @ theirs.Vh)
