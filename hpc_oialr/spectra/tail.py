"""The power law that the tail of a spectrum follows."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

# WeightWatcher fits fewer values in another way, and says that fits of so few mean little.
FEWEST = 20
# Smaller ones, relative to the largest, are rounding errors of a float32 SVD.
_ZERO = 1e-6
# Rows that are computed at once: enough to make NumPy's calls few, and few enough to stay in the cache.
_BLOCK = 32


def power_law_exponent(s: NDArray[np.floating]) -> float:
    """``alpha`` of ``p(x) ~ x^-alpha``, x >= x_min, for the eigenvalues ``x = s^2`` of ``W^T W``.

    For each value as x_min the maximum-likelihood exponent ``1 + n / sum ln(x / x_min)`` of the n values from
    there on; the x_min that counts is that of the smallest Kolmogorov-Smirnov distance. The method of the
    package powerlaw, whose loop takes a hundred times as long and whose version 2 admits no alpha above 3 unless
    it is told to; the same number as WeightWatcher's ``alpha`` of a matrix (its default, without "fingers"). Of a
    convolution WeightWatcher takes the slices, this project the whole kernel as one matrix.

    Parameters
    ----------
    s
        Singular values, in any order; shape (r,).

    Returns
    -------
    float
        NaN for fewer than 20 values, and where all are equal.

    Notes
    -----
    ``r^2 / 2`` exponentials: 512 values take about 1 ms, 4,096 about 50 ms, a fraction of their SVD.

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
    exponents = _exponents(logs)
    best = float(exponents[int(np.argmin(_distances(logs, exponents)))])
    return best if math.isfinite(best) else math.nan


def _exponents(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Maximum-likelihood exponent from each value but the last on; infinite where all are equal."""
    count = len(logs) - np.arange(len(logs) - 1.0)
    excess = np.cumsum(logs[::-1])[::-1][:-1] - count * logs[:-1]
    with np.errstate(divide="ignore"):
        return 1 + count / np.maximum(excess, 0)


def _distances(logs: NDArray[np.float64], exponents: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each value but the last as x_min, between the law's distribution function and that of the values."""
    count = len(logs)
    distances = np.ones(count - 1)
    for start in range(0, count - 1, _BLOCK):
        stop = min(start + _BLOCK, count - 1)
        first = np.arange(start, stop)[:, None]
        place = np.arange(start, count)[None] - first
        with np.errstate(invalid="ignore", over="ignore"):
            fitted = 1 - np.exp(
                (1 - exponents[start:stop, None]) * (logs[None, start:] - logs[start:stop, None])
            )
            gaps = np.abs(fitted - place / (count - first))
        gaps[place < 0] = 0
        distances[start:stop] = gaps.max(axis=1)
    distances[~np.isfinite(exponents)] = 1.0
    return distances
