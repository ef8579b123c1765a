"""Figures that follow from a matrix's singular values alone."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.floating]

FEWEST = 20  # a fit of fewer values means little; WeightWatcher fits them in another way
_ZERO = 1e-6  # smaller values, relative to the largest, are rounding errors of a float32 SVD
_BLOCK = 32  # rows that are computed at once: few calls of NumPy, and they stay in the cache


def spectral_quantities(s: Values, m: int, n: int) -> dict[str, float]:
    """All of them, for the descending singular values ``s`` of an m x n matrix; about 1 ms for 512 values."""
    s = s.astype(np.float64)
    edge = bulk_edge(s, m, n)
    return {
        "stable_rank": stable_rank(s),
        "effective_rank": effective_rank(s),
        "condition_number": condition_number(s),
        "noise_edge": edge,
        "values_above_edge": math.nan if math.isnan(edge) else float(np.count_nonzero(s > edge)),
        "alpha": power_law_exponent(s),
    }


def stable_rank(s: Values) -> float:
    """``||W||_F^2 / ||W||_2^2 = sum s^2 / s_0^2`` of descending singular values ``s``; 0 for a matrix of zeros.

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

    >>> condition_number(np.array([4.0, 2.0, 1.0]))
    4.0
    """
    if not len(s) or s[0] == 0:
        return math.nan
    return float(s[0] / s[-1]) if s[-1] > 0 else math.inf


def bulk_edge(s: Values, m: int, n: int) -> float:
    """Largest singular value that noise alone would have; NaN if the median of all k values has been cut.

    See :func:`hpc_oialr.linalg.noise_spectra.noise_edge`.
    """
    # Imports torch, which takes seconds and is not needed to read a record.
    from hpc_oialr.linalg.noise_spectra import noise_edge

    middle = (min(m, n) - 1) // 2
    return noise_edge(float(s[middle]), m, n) if middle < len(s) else math.nan


def power_law_exponent(s: Values) -> float:
    """``alpha`` of ``p(x) ~ x^-alpha``, x >= x_min, for the eigenvalues ``x = s^2`` of ``W^T W``.

    For each value as x_min the maximum-likelihood exponent ``1 + n / sum ln(x / x_min)`` of the n values from
    there on; the x_min of the smallest Kolmogorov-Smirnov distance counts. NaN for fewer than 20 values, and where
    all are equal. ``s`` may be in any order; shape (r,).

    The method of the package powerlaw, whose loop takes a hundred times as long and whose version 2 limits alpha to 3
    by default; equals WeightWatcher's ``alpha`` of a matrix (without "fingers"). Of a convolution WeightWatcher takes
    the slices, this project the whole kernel as one matrix. 512 values take about 1 ms, 4,096 about 50 ms.

    References
    ----------
    A. Clauset, C. R. Shalizi, M. E. J. Newman, SIAM Review 51 (2009). C. H. Martin, T. Peng, M. W. Mahoney,
    Nat. Commun. 12 (2021).

    Examples
    --------
    >>> x = (1 - (np.arange(1000) + 0.5) / 1000) ** (-1 / 1.5)  # quantiles of a power law of exponent 2.5
    >>> round(power_law_exponent(np.sqrt(x)), 2)
    2.5
    """
    x = np.sort(s.astype(np.float64) ** 2)
    x = x[x > _ZERO**2 * x[-1]] if len(x) else x
    if len(x) < FEWEST:
        return math.nan
    logs = np.log(x)
    # From each value but the last on; infinite where all are equal.
    count = len(logs) - np.arange(len(logs) - 1.0)
    excess = np.cumsum(logs[::-1])[::-1][:-1] - count * logs[:-1]
    with np.errstate(divide="ignore"):
        exponents = 1 + count / np.maximum(excess, 0)
    best = float(exponents[int(np.argmin(_distances(logs, exponents)))])
    return best if math.isfinite(best) else math.nan


def _distances(logs: NDArray[np.float64], exponents: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each value but the last as x_min, between the law's distribution function and that of the values."""
    count = len(logs)
    distances = np.ones(count - 1)
    for start in range(0, count - 1, _BLOCK):
        stop = min(start + _BLOCK, count - 1)
        first = np.arange(start, stop)[:, None]
        place = np.arange(start, count)[None] - first
        with np.errstate(invalid="ignore", over="ignore"):
            fitted = 1 - np.exp((1 - exponents[start:stop, None]) * (logs[None, start:] - logs[start:stop, None]))
            gaps = np.abs(fitted - place / (count - first))
        gaps[place < 0] = 0
        distances[start:stop] = gaps.max(axis=1)
    distances[~np.isfinite(exponents)] = 1.0
    return distances
