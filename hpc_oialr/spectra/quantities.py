"""Figures that follow from a matrix's singular values alone."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hpc_oialr.method.noise import noise_edge
from hpc_oialr.spectra.tail import power_law_exponent

Values = NDArray[np.floating]


def stable_rank(s: Values) -> float:
    """``||W||_F^2 / ||W||_2^2 = sum s^2 / s_0^2``; 0 for a matrix of zeros.

    Parameters
    ----------
    s
        Singular values, descending; shape (r,).

    Examples
    --------
    >>> stable_rank(np.array([2.0, 2.0, 2.0]))
    3.0
    """
    return float((s / s[0]) @ (s / s[0])) if len(s) and s[0] > 0 else 0.0


def effective_rank(s: Values) -> float:
    """``exp(-sum p ln p)`` with ``p = s / sum s``; 0 for a matrix of zeros.

    References
    ----------
    Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.

    Examples
    --------
    >>> round(effective_rank(np.array([2.0, 2.0, 2.0, 2.0])), 12)
    4.0
    """
    left = s[s > 0]
    if not len(left):
        return 0.0
    p = left / left.sum()
    return math.exp(-float(p @ np.log(p)))


def condition_number(s: Values) -> float:
    """Largest over smallest value; infinite if that is 0, NaN for a matrix of zeros.

    Examples
    --------
    >>> condition_number(np.array([4.0, 2.0, 1.0]))
    4.0
    """
    if not len(s) or s[0] == 0:
        return math.nan
    return float(s[0] / s[-1]) if s[-1] > 0 else math.inf


def bulk_edge(s: Values, m: int, n: int) -> float:
    """Largest singular value that noise alone would have in an m x n matrix; NaN if it cannot be told.

    The noise level comes from the median of all k values; once more than half of them are cut, the bulk is gone.

    References
    ----------
    See :func:`hpc_oialr.method.noise.noise_edge`.
    """
    middle = (min(m, n) - 1) // 2
    return noise_edge(float(s[middle]), m, n) if middle < len(s) else math.nan


def values_above(s: Values, edge: float) -> float:
    """How many values stand above an edge; NaN if there is none.

    Examples
    --------
    >>> values_above(np.array([3.0, 2.0, 1.0]), 1.5)
    2.0
    """
    return math.nan if math.isnan(edge) else float(np.count_nonzero(s > edge))


def spectral_quantities(s: Values, m: int, n: int) -> dict[str, float]:
    """The record's fields that follow from the singular values that are left of an m x n matrix.

    Of 512 values in about 1 ms, nearly all of it for ``alpha``.

    Parameters
    ----------
    s
        Descending; shape (r,), r <= min(m, n).
    """
    s = s.astype(np.float64)
    edge = bulk_edge(s, m, n)
    return {
        "stable_rank": stable_rank(s),
        "effective_rank": effective_rank(s),
        "condition_number": condition_number(s),
        "noise_edge": edge,
        "values_above_edge": values_above(s, edge),
        "alpha": power_law_exponent(s),
    }
