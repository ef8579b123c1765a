"""Stability, principal angles and R-factor distance between two SVDs of one weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.blocks import gram_products, stability_of
from hpc_oialr.linalg.communicator import Group
from hpc_oialr.linalg.svd import SVD

# The leading subspace has this part of a basis's vectors, rounded up.
LEADING = 0.25


class BasisChange(NamedTuple):
    """From one SVD to the next; NaN where there was none before.

    Attributes
    ----------
    stability
        ``<U1 Vh1, U2 Vh2>_F / k``; see :func:`~hpc_oialr.linalg.blocks.basis_stability`.
    angle_U, angle_Vh
        Largest principal angle between the leading subspaces (rad); see :func:`smallest_cosines`.
    r_distance
        ``||R2 - R1||_F / ||R1||_F`` of the weights' QR; see :func:`triangular_factor`.
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

    Parameters
    ----------
    last, now
        This process's rows of ``U``, all of ``s``, its columns of ``Vh``.
    group
        See :func:`~hpc_oialr.linalg.communicator.communicator`.
    whole
        Makes a whole ``Vh`` of this process's columns; a collective call.

    Notes
    -----
    ``2 k^2 (m_p + n_p)`` operations and one all-reduce of ``2 k^2`` numbers for the Gram products, of whose blocks
    the angles are; two QR of ``k x n``. Nothing of size m x n is built.
    """
    gram_u, gram_v = gram_products(last.U, last.Vh, now.U, now.Vh, group)
    angle_U, angle_Vh = angles_of(smallest_cosines(gram_u, gram_v))
    R1, R2 = (triangular_factor(part.s, whole(part.Vh)) for part in (last, now))
    size = float(torch.linalg.matrix_norm(R1))
    distance = float(torch.linalg.matrix_norm(R2 - R1)) / size if size else math.nan
    return BasisChange(stability_of(gram_u, gram_v), angle_U, angle_Vh, distance)


def leading_dimension(r: int) -> int:
    """How many of a basis's r vectors are called leading: ``ceil(r / 4)``.

    Examples
    --------
    >>> leading_dimension(64), leading_dimension(5)
    (16, 2)
    """
    return math.ceil(LEADING * r)


def angles_of(cosines: Tensor) -> list[float]:
    """Principal angles (rad) of their cosines."""
    angles: list[float] = cosines.double().clamp(0, 1).arccos().tolist()
    return angles


def smallest_cosines(*grams: Tensor) -> Tensor:
    """Cosine of the largest principal angle between two leading subspaces, for each ``Q1^T Q2`` of two bases.

    ``sigma_min`` of the product's leading ``d x d`` block, d = ceil(r / 4). The cosine hides small angles:
    below about 1e-3 rad in float32 (3e-8 in float64) they cannot be told from 0. All products have one shape.

    Notes
    -----
    One batched SVD without vectors, of 1/64 of a whole one's work.

    References
    ----------
    A. Bjorck, G. Golub, Math. Comp. 27 (1973), theorem 1.
    """
    d = leading_dimension(grams[0].shape[0])
    blocks = torch.stack([gram[:d, :d] for gram in grams])
    cosines: Tensor = torch.linalg.svdvals(blocks)[:, -1]
    return cosines


def triangular_factor(s: Tensor, Vh: Tensor) -> Tensor:
    """R (k x n, diagonal >= 0) of the QR of ``W = U diag(s) Vh``, without U.

    ``U`` has orthonormal columns, so the R of ``diag(s) Vh`` is that of W. With a diagonal above 0 it is unique.
    """
    _, R = torch.linalg.qr(s[:, None] * Vh, mode="r")
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R)
    turned: Tensor = signs[:, None] * R
    return turned
