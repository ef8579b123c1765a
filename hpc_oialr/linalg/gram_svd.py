"""SVDs on a GPU by the eigenvectors of the Gram matrix in float64, each checked without waiting for the device."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

# cuSOLVER's gesvda works on all matrices of a batch at once, its syevd on one after another: 73 of 192 x 192 took 12 and
# 111 ms on an H100, gesvdj 351 ms (torch 2.11).
Form = Literal["gesvda", "eigh"]
FORMS: tuple[Form, ...] = get_args(Form)

# Largest ||Q^T Q - I||_F / sqrt(k) of both bases and ||A - U diag(s) Vh||_F / ||A||_F: about those of fp32 drivers.
TOLERANCE = 1e-6
# A V of a singular value below this part of the largest is noise: eigenvalues are its squares, known to 2e-16.
_LOST = 2e-8


def gram_svd(A: Tensor, *, form: Form = FORMS[0]) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVDs of fp32 matrices (L x m x n): ``A^T A = V diag(s^2) V^T`` in float64, ``U`` from ``A V``.

    Returns fp32 ``U`` (L x m x k), ``s`` (L x k, descending), ``Vh`` (L x k x n), with k = min(m, n). ``s`` is NaN for
    each matrix whose bases or product miss :data:`TOLERANCE`, or that is not finite: so the check needs no read-back.
    Singular values have errors of about 2e-8 of the largest. About ``9 k^3`` operations in float64 for the eigenvectors
    and ``20 m n k`` in products. Raises ``torch.linalg.LinAlgError`` if the eigenvectors do not converge.
    """
    wide = A.shape[-2] < A.shape[-1]
    B = A.detach().double()
    B = B.mT if wide else B
    V = _right_vectors(B, form)
    C = B @ V
    U = _orthonormal_columns(C)
    # What U^T C has above its diagonal is in the residual. Noise must not disturb the order.
    s = (U * C).sum(-2).clamp_min(0).cummin(-1).values
    residual, size = (torch.linalg.matrix_norm(X) for X in (C - U * s[:, None], B))
    right = residual <= TOLERANCE * size
    for Q in (U, V):
        gram = Q.mT @ Q
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        right &= torch.linalg.matrix_norm(gram) <= TOLERANCE * Q.shape[-1] ** 0.5
    s = torch.where(right[:, None], s, torch.nan)
    left, turned = (V, U.mT) if wide else (U, V.mT)
    return left.to(A.dtype), s.to(A.dtype), turned.to(A.dtype)


def _orthonormal_columns(C: Tensor) -> Tensor:
    """Orthonormal bases (L x m x k) whose leading columns span those of C, which are almost orthogonal and descending.

    Cholesky-QR three times; before the second, columns that are noise become random ones orthogonal to the others.
    """
    norms = torch.linalg.vector_norm(C, dim=-2, keepdim=True)
    lost = norms <= _LOST * norms.amax(-1, keepdim=True)
    Q = torch.where(lost, 0.0, C / norms)
    Q = _cholesky_qr(Q, extra=lost)
    generator = torch.Generator(C.device).manual_seed(0)
    noise = torch.randn(C.shape[-2:], generator=generator, dtype=C.dtype, device=C.device)
    rest = noise - Q @ (Q.mT @ noise)
    Q = torch.where(lost, rest / torch.linalg.vector_norm(rest, dim=-2, keepdim=True), Q)
    return _cholesky_qr(_cholesky_qr(Q))


def _cholesky_qr(Q: Tensor, extra: Tensor | None = None) -> Tensor:
    """``Q R^-1`` with ``Q^T Q = R^T R``; ``extra`` marks zero columns (L x 1 x k), which stay zero."""
    gram = Q.mT @ Q
    if extra is not None:
        gram.diagonal(dim1=-2, dim2=-1).add_(extra[:, 0])
    # No check of success, which would wait for a GPU: the caller sees it in the result.
    L = torch.linalg.cholesky_ex(gram).L
    solved: Tensor = torch.linalg.solve_triangular(L.mT, Q, upper=True, left=False)
    return solved


def _right_vectors(B: Tensor, form: Form) -> Tensor:
    """Right singular vectors of matrices (L x m x k, m >= k) in float64, of descending singular values."""
    if form == "eigh":
        V: Tensor = torch.linalg.eigh(B.mT @ B).eigenvectors.flip(-1)
        return V
    found = torch.linalg.svd(B, full_matrices=False, driver="gesvda" if B.is_cuda else None)
    # Its columns are orthonormal to 1e-8 only, as its eigenvectors come from products in blocks.
    return _cholesky_qr(found.Vh.mT)
