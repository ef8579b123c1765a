"""The low-rank approximation that changes a layer's output least, by second moments of its inputs and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.svd import SVD, svd

# Added to a matrix of second moments, relative to its mean diagonal: directions that were not seen are not free.
DAMPING = 1e-3


@exact_arithmetic()
def weighted_svd(A: Tensor, r: int, left: Tensor | None = None, right: Tensor | None = None) -> tuple[SVD, Tensor]:
    """``X = U diag(s) Vh`` of inner dimension ``r`` that minimises ``tr(left (A - X) right (A - X)^T)``.

    With ``right = E[x x^T]`` that is ``E ||(A - X) x||^2``, the change of the output; with ``left = E[dy dy^T]`` as
    well, a second-order estimate of the change of the loss in which inputs and gradients are independent.

    With Cholesky factors ``left = L L^T`` and ``right = R R^T``, and the leading r left singular vectors ``P`` of
    ``L^T A R``, the minimum is ``X = L^-T P P^T L^T A`` (Eckart and Young), which is then factored by a QR of m x r and
    an SVD of r x n.

    Parameters
    ----------
    A
        m x n, float32 or float64.
    left, right
        Second moments, m x m and n x n, up to a factor; None for the identity.

    Returns
    -------
    Orthonormal ``U`` (m x r) and ``Vh`` (r x n), ``s`` descending; and the minimum over ``tr(left A right A^T)``,
    shape (): the share that is lost.

    Notes
    -----
    For square matrices about ``21 n^3`` operations for the SVD of ``L^T A R``, ``20 n r^2`` for the rest.

    References
    ----------
    With inputs: SVD-LLM, arXiv 2403.07378. With gradients: arXiv 2207.00112 (diagonal), K-FAC, arXiv 1503.05671.
    """
    L, R = _cholesky(left), _cholesky(right)
    B = A if L is None else L.mT @ A
    P, values, _ = svd(B if R is None else B @ R)
    squares, P = values.square(), P[:, :r]
    lost = squares[r:].sum() / squares.sum().clamp(min=torch.finfo(A.dtype).tiny)
    core = P.mT @ B
    if L is not None:
        P, T = torch.linalg.qr(torch.linalg.solve_triangular(L.mT, P, upper=True))
        core = T @ core
    U, s, Vh = svd(core)
    return SVD(P @ U, s, Vh), lost


@exact_arithmetic()
def weighted_values(A: Tensor, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """Singular values of ``L^T A R`` as in :func:`weighted_svd`; their squares sum to ``tr(left A right A^T)``."""
    L, R = _cholesky(left), _cholesky(right)
    B = A if L is None else L.mT @ A
    return svd(B if R is None else B @ R).s


def _cholesky(moments: Tensor | None) -> Tensor | None:
    """Factor of the damped matrix, computed in float64; None where nothing was seen."""
    mean = torch.zeros(()) if moments is None else moments.diagonal().double().mean()
    if moments is None or float(mean) == 0:
        return None
    scaled = moments.to(torch.float64, copy=True).div_(mean)
    scaled.diagonal().add_(DAMPING)
    torch.linalg.cholesky(scaled, out=scaled)
    return scaled.to(moments.dtype)
