"""Stability, principal angles and R-factor distance between two SVDs of one weight; orthogonality of a basis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.communicator import Group, communicator
from hpc_oialr.linalg.svd import SVD, compute_dtype

# The leading subspace has this part of a basis's vectors, rounded up.
LEADING = 0.25


class BasisChange(NamedTuple):
    """From one SVD to the next; NaN where there was none before.

    :func:`stability_of`; largest principal angles between the leading subspaces (rad), see
    :func:`smallest_cosines`; ``||R2 - R1||_F / ||R1||_F`` of the weights' QR, see :func:`triangular_factor`.
    """

    stability: float = math.nan
    angle_U: float = math.nan
    angle_Vh: float = math.nan
    r_distance: float = math.nan


@exact_arithmetic()
def basis_change(
    last: SVD, now: SVD, group: Group = None, *, whole: Callable[[Tensor], Tensor] = lambda Vh: Vh
) -> BasisChange:
    """Compare two thin SVDs of one m x n weight, with all its k = min(m, n) values.

    ``last`` and ``now`` are this rank's rows of ``U``, all of ``s``, its columns of ``Vh``, of which ``whole`` makes a
    whole ``Vh``, a collective call. ``2 k^2 (m_p + n_p)`` operations and one all-reduce of ``2 k^2`` numbers for the
    Gram products; two QR of ``k x n``. Nothing of size m x n is built.
    """
    gram_u, gram_v = gram_products(last.U, last.Vh, now.U, now.Vh, group)
    angle_U, angle_Vh = angles_of(smallest_cosines(gram_u, gram_v))
    R1, R2 = (triangular_factor(part.s, whole(part.Vh)) for part in (last, now))
    size = float(torch.linalg.matrix_norm(R1))
    distance = float(torch.linalg.matrix_norm(R2 - R1)) / size if size else math.nan
    return BasisChange(stability_of(gram_u, gram_v), angle_U, angle_Vh, distance)


@exact_arithmetic()
def gram_products(U1: Tensor, Vh1: Tensor, U2: Tensor, Vh2: Tensor, group: Group = None) -> tuple[Tensor, Tensor]:
    """``U1^T U2`` and ``Vh1 Vh2^T``, whole on every rank: one all-reduce of ``2 r1 r2`` numbers.

    Of this rank's rows of ``U`` (m_p x r1, m_p x r2) and columns of ``Vh`` (r1 x n_p, r2 x n_p).
    """
    dtype = compute_dtype(U1.dtype)
    U1, Vh1, U2, Vh2 = (part.detach().to(dtype) for part in (U1, Vh1, U2, Vh2))
    gram_u, gram_v = communicator(group).all_reduce(torch.stack([U1.mT @ U2, Vh1 @ Vh2.mT]))
    return gram_u, gram_v


def stability_of(gram_u: Tensor, gram_v: Tensor) -> float:
    """Agreement of two bases, ``<U1 Vh1, U2 Vh2>_F / sqrt(r1 r2)``, from their :func:`gram_products`.

    1 = the same, about 0 = unrelated; signs of singular vectors, which are arbitrary in pairs, do not matter.
    arXiv 2401.08505, section 3 (there r1 = r2 = k and one process).
    """
    return float((gram_u * gram_v).sum(dtype=torch.float64)) / math.sqrt(gram_u.shape[0] * gram_u.shape[1])


def angles_of(cosines: Tensor) -> list[float]:
    """Principal angles (rad) of their cosines."""
    return list(cosines.double().clamp(0, 1).arccos().tolist())


def smallest_cosines(*grams: Tensor) -> Tensor:
    """Cosine of the largest principal angle between two leading subspaces, for each ``Q1^T Q2`` of two bases.

    ``sigma_min`` of the product's leading ``d x d`` block, d = ceil(r / 4): one batched SVD without vectors, of 1/64
    of the work of a whole one. The cosine hides small angles: below about 1e-3 rad in float32 (3e-8 in float64) they
    cannot be told from 0. All products have one shape. A. Bjorck, G. Golub, Math. Comp. 27 (1973), theorem 1.
    """
    d = math.ceil(LEADING * grams[0].shape[0])
    blocks = torch.stack([gram[:d, :d] for gram in grams])
    cosines: Tensor = torch.linalg.svdvals(blocks)[:, -1]
    return cosines


def smallest_cosines_batched(rotations: Sequence[Tensor]) -> list[Tensor]:
    """:func:`smallest_cosines` (float64, shape ()) of many orthogonal ``Q1^T Q2`` (r x r) without waiting for a GPU.

    ``1 - cos^2`` is the largest eigenvalue of ``X = B^T B``, B the rows below the leading block. Squaring X 24 times
    leaves it, up to a factor of ``d^(2^-24)``: errors below 1e-6, by batched products alone.
    """
    found: dict[int, Tensor] = {}
    for r in {len(Q): None for Q in rotations}:
        same, d = [i for i, Q in enumerate(rotations) if len(Q) == r], math.ceil(LEADING * r)
        below = torch.stack([rotations[i][d:, :d] for i in same]).double()
        X, log = below.mT @ below, below.new_zeros(len(same))
        for i in range(24):
            trace = X.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-150)
            log += trace.log() / 2**i
            X = X / trace[:, None, None]
            X = X @ X
        found |= dict(zip(same, (1 - log.exp()).clamp_min(0).sqrt(), strict=True))
    return [found[i] for i in range(len(rotations))]


def triangular_factor(s: Tensor, Vh: Tensor) -> Tensor:
    """R (k x n, diagonal >= 0) of the QR of ``W = U diag(s) Vh``, without U.

    ``U`` has orthonormal columns, so the R of ``diag(s) Vh`` is that of W. With a diagonal above 0 it is unique.
    """
    _, R = torch.linalg.qr(s[:, None] * Vh, mode="r")
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R)
    turned: Tensor = signs[:, None] * R
    return turned


@exact_arithmetic()
def orthogonality_error(Q: Tensor, group: Group = None) -> float:
    """``||Q^T Q - I||_F / sqrt(r)`` for Q in row blocks (m_p x r); for ``Vh`` in columns pass ``Vh.mT``."""
    return float(gram_errors([Q], group))


def gram_errors(bases: Sequence[Tensor], group: Group = None) -> Tensor:
    """:func:`orthogonality_error` of bases of one r, on their device, without waiting for it; in exact arithmetic."""
    Qs = [Q.detach().to(compute_dtype(Q.dtype)) for Q in bases]
    grams = torch.stack([Q.mT @ Q for Q in Qs])
    if group is not None:
        grams = communicator(group).all_reduce(grams)
    grams.diagonal(dim1=-2, dim2=-1).sub_(1)
    errors: Tensor = torch.linalg.matrix_norm(grams) / max(1.0, math.sqrt(grams.shape[-1]))
    return errors
