"""SVDs on the device: every driver's accuracy, screening, the chain of fall-backs."""

from __future__ import annotations

import pytest
import torch

from hpc_oialr.errors import NonFiniteError
from hpc_oialr.linalg.gram_svd import FORMS, Form, gram_svd
from hpc_oialr.linalg.svd import svd

pytestmark = pytest.mark.gpu


def matrix(m: int, n: int, smallest: float) -> torch.Tensor:
    """Random bases around singular values from 1 down to ``smallest``, float64."""
    generator = torch.Generator().manual_seed(0)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    return U * torch.logspace(0, torch.tensor(smallest).log10().item(), k, dtype=torch.float64) @ V.mT


@pytest.mark.parametrize("smallest", [0.1, 1e-9], ids=["well conditioned", "singular"])
@pytest.mark.parametrize("shape", [(1, 1), (96, 96), (384, 96), (64, 320)])
def test_an_svd_is_accurate(shape: tuple[int, int], smallest: float, device: torch.device) -> None:
    A = matrix(*shape, smallest)
    U, s, Vh = svd(A.float().to(device))
    assert {t.device.type for t in (U, s, Vh)} == {device.type}
    assert {t.dtype for t in (U, s, Vh)} == {torch.float32}
    exact = torch.linalg.svdvals(A.float().double())
    assert (s.cpu().double() - exact).abs().max() < 2e-5  # of gesvdj, where memory is too short for a Gram matrix
    for Q in (U.cpu().double(), Vh.mT.cpu().double()):
        assert torch.linalg.norm(Q.mT @ Q - torch.eye(Q.shape[1])) < 1e-4
    product = U.cpu().double() * s.cpu().double() @ Vh.cpu().double()
    assert torch.linalg.norm(product - A) < 1e-5 * torch.linalg.norm(A) * min(shape) ** 0.5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("smallest", [0.1, 1e-9], ids=["well conditioned", "singular"])
def test_a_batch_is_accurate_in_every_form(form: Form, smallest: float, device: torch.device) -> None:
    A = torch.stack([matrix(256, 96, smallest)] * 5).float().to(device)
    if form == "gesvda" and smallest < 1e-7 and device.type == "cuda":
        # Values below the rounding of fp32: it gives up, and "eigh" follows.
        with pytest.raises(torch.linalg.LinAlgError):
            gram_svd(A, form=form)
        return
    U, s, Vh = (part.double() for part in gram_svd(A, form=form))
    assert bool(s.isfinite().all())
    exact = torch.linalg.svdvals(A[0].double())
    assert (s - exact).abs().max() < 1e-6
    assert torch.linalg.matrix_norm((U * s[:, None]) @ Vh - A).max() < 1e-6 * torch.linalg.norm(A[0])
    for Q in (U, Vh.mT):
        gap = Q.mT @ Q - torch.eye(96, dtype=Q.dtype, device=device)
        assert torch.linalg.matrix_norm(gap).max() < 1e-6 * 96**0.5


@pytest.mark.parametrize("driver", ["gesvdj", "gesvd", "gesvda"])
def test_a_driver_is_accurate(driver: str, device: torch.device) -> None:
    A = matrix(256, 96, 0.01)
    chosen = driver if device.type == "cuda" else None
    s = torch.linalg.svd(A.float().to(device), full_matrices=False, driver=chosen).S
    # gesvda is made for many tall matrices at once, and says that it is less accurate.
    bound = 1e-4 if driver == "gesvda" else 1e-5
    assert (s.cpu().double() - torch.linalg.svdvals(A)).abs().max() < bound


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_found_before_any_driver_sees_it(bad: float, device: torch.device) -> None:
    A = torch.ones(64, 32, device=device)
    A[3, 5] = A[7, 1] = bad
    with pytest.raises(NonFiniteError, match="blocks.3.mlp holds 2 NaN or Inf among 2048 values"):
        svd(A, name="blocks.3.mlp")


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_driver_that_fails_is_followed_by_the_next(
    failures: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, after the Gram matrix: the third driver is the CPU's, in float64; the result lies where A did."""
    real, tried = torch.linalg.svd, []

    def unreliable(A: torch.Tensor, **options: object) -> object:
        tried.append(A.device.type)
        if len(tried) <= failures:
            raise torch.linalg.LinAlgError("did not converge")
        return real(A, **options)

    attempts = 4 if device.type == "cuda" else 3
    A = matrix(96, 48, 0.1).float().to(device)
    monkeypatch.setattr(torch.linalg, "svd", unreliable)
    missed = [part * torch.nan for part in gram_svd(A[None], form="eigh")]
    monkeypatch.setattr("hpc_oialr.linalg.svd.gram_svd", lambda A, form: missed)
    if failures == attempts:
        with pytest.raises(NonFiniteError, match="no SVD of matrix .* converged"):
            svd(A)
        return
    U, s, Vh = svd(A)
    assert tried == ([device.type, device.type, "cpu", "cpu"] if attempts == 4 else ["cpu"] * 3)[: failures + 1]
    assert U.device == s.device == Vh.device == A.device
    torch.testing.assert_close(U * s @ Vh, A, rtol=0, atol=1e-5)
