"""SVDs by the Gram matrix, on the CPU: exact for every spectrum, and a failure is seen in the result."""

from __future__ import annotations

import pytest
import torch

from hpc_oialr.linalg import gram_svd as module
from hpc_oialr.linalg.gram_svd import FORMS, Form, gram_svd

SPECTRA = {
    "graded to 1e-12": lambda k: torch.logspace(0, -12, k, dtype=torch.float64),
    "graded to 1e-5": lambda k: torch.logspace(0, -5, k, dtype=torch.float64),
    "repeated": lambda k: torch.tensor([2.0] * (k // 2) + [1.0] * (k - k // 2), dtype=torch.float64),
    "rank-deficient": lambda k: (torch.arange(k) <= k // 3).double(),
    "at the limit of what squares show": lambda k: torch.tensor([1.0] + [3e-8] * (k - 1)).double(),
    "zero": lambda k: torch.zeros(k, dtype=torch.float64),
    "tiny": lambda k: torch.linspace(1, 0.1, k, dtype=torch.float64) * 1e-37,
    "huge": lambda k: torch.linspace(1, 0.1, k, dtype=torch.float64) * 1e37,
}


def matrices(m: int, n: int, spectrum: str, count: int = 3) -> torch.Tensor:
    """Random bases around the spectrum, fp32."""
    generator, k = torch.Generator().manual_seed(0), min(m, n)
    U, V = (torch.linalg.qr(torch.randn(count, rows, k, generator=generator, dtype=torch.float64)).Q for rows in (m, n))
    return (U * SPECTRA[spectrum](k) @ V.mT).float()


def errors(A: torch.Tensor, U: torch.Tensor, s: torch.Tensor, Vh: torch.Tensor) -> list[float]:
    """Of the worst matrix: both bases, the product, the singular values."""
    A, U, s, Vh = (part.double() for part in (A, U, s, Vh))
    exact, eye = torch.linalg.svdvals(A), torch.eye(s.shape[-1], dtype=torch.float64)
    size, largest = torch.linalg.matrix_norm(A), exact[:, :1]
    found = (
        *(torch.linalg.matrix_norm(Q.mT @ Q - eye) / len(eye) ** 0.5 for Q in (U, Vh.mT)),
        torch.linalg.matrix_norm((U * s[:, None]) @ Vh - A) / torch.where(size == 0, 1, size),
        (s - exact).abs() / torch.where(largest == 0, 1, largest),
    )
    return [float(error.max()) for error in found]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (48, 48), (96, 32), (32, 96), (1, 7), (7, 1)])
def test_every_spectrum(shape: tuple[int, int], spectrum: str, form: Form) -> None:
    A = matrices(*shape, spectrum)
    U, s, Vh = gram_svd(A, form=form)
    k = min(shape)
    assert (U.shape, s.shape, Vh.shape) == ((3, shape[0], k), (3, k), (3, k, shape[1]))
    assert {part.dtype for part in (U, s, Vh)} == {torch.float32}
    assert max(errors(A, U, s, Vh)) < 1e-6
    assert bool((s.diff() <= 0).all())
    assert bool((s >= 0).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 6])
def test_every_form(form: Form, count: int) -> None:
    A = matrices(40, 24, "graded to 1e-5", count)
    assert max(errors(A, *gram_svd(A, form=form))) < 1e-6


def test_equal_rows_leave_one_direction() -> None:
    A = torch.ones(1, 300, 200)
    assert max(errors(A, *gram_svd(A))) < 1e-6


@pytest.mark.parametrize("wrong", ["turned", "not orthonormal", "not finite"])
def test_wrong_eigenvectors_make_nan_of_their_matrix_only(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._right_vectors

    def broken(B: torch.Tensor, form: Form) -> torch.Tensor:
        V = real(B, form)
        if wrong == "turned":
            V[1] = torch.linalg.qr(V[1] + 1e-4 * torch.randn_like(V[1])).Q
        elif wrong == "not orthonormal":
            V[1] *= 1 + 1e-5
        else:
            V[1, 0, 0] = torch.nan
        return V

    monkeypatch.setattr(module, "_right_vectors", broken)
    _, s, _ = gram_svd(matrices(20, 12, "graded to 1e-5"))
    assert s.isfinite().all(-1).tolist() == [True, False, True]
