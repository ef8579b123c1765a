"""Spectra of noise, and of weak signal in it: of matrices, and of a tensor's unfoldings.

Noise of standard deviation ``noise`` in every entry gives an m x n unfolding (m = n_l, n the product of the other sizes,
``c = m / n``) squared singular values of Marchenko and Pastur's law. In the units of this file,
``xi = (s^2 / (noise^2 n) - 1) / sqrt(c)``, that law is a semicircle on [-2, 2] for ``c = 0``, the limit of large tensors,
and ends at ``2 + sqrt(c)`` otherwise. A component of singular value s has the strength
``rho = s^2 / (noise^2 sqrt(m n))``, one number for all modes, and can be detected if and only if ``rho > 1``. With
``noise = 1 / sqrt(n_1 + ... + n_N)`` this is the model of H. Lebeau, F. Chatelain and R. Couillet, A random matrix
approach to low-multilinear-rank tensor approximation, 2024, arXiv 2402.03169.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hpc_oialr.errors import ConfigError, check_interval


@lru_cache(maxsize=256)
def marchenko_pastur_median(c: float) -> float:
    """Median of the Marchenko-Pastur law with aspect ratio ``c`` = short side / long side, in (0, 1].

    The law of the squared singular values of noise of unit variance over the long side; density
    ``sqrt((b - x)(x - a)) / (2 pi c x)`` on [a, b] = [(1 - sqrt c)^2, (1 + sqrt c)^2].

    Examples
    --------
    >>> round(marchenko_pastur_median(1.0), 3)
    0.653
    """
    low, high = (1 - c**0.5) ** 2, (1 + c**0.5) ** 2
    angle = np.linspace(0.0, np.pi, 20_001)
    x = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    density = np.sqrt(np.clip((high - x) * (x - low), 0, None)) / (2 * np.pi * c * np.maximum(x, 1e-300))
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))])
    return float(np.interp(mass[-1] / 2, mass, x))


def noise_edge(median_singular_value: float, m: int, n: int) -> float:
    """Largest singular value that noise alone would have: ``sigma (sqrt m + sqrt n)``.

    ``sigma`` comes from the median of all k singular values (Gavish & Donoho, IEEE Trans. Inf.
    Theory 60, 2014, section III.D), so that signal in fewer than half of them hardly moves it.
    """
    return float(_level_by_median(median_singular_value, m, n) * (m**0.5 + n**0.5))


def _level_by_median(median_singular_value: float, m: int, n: int) -> float:
    """Standard deviation of the noise in an m x n matrix that has this median."""
    long, short = max(m, n), min(m, n)
    return float(median_singular_value / (long * marchenko_pastur_median(short / long)) ** 0.5)


def noise_level(spectra: Sequence[Tensor], shape: Sequence[int]) -> float:
    """Standard deviation of a tensor's noise, by the median of the unfolding with the most singular values.

    Parameters
    ----------
    spectra
        All singular values of each unfolding, descending, as in ``mlsvd(T).spectra``.
    shape
        The tensor's sizes.
    """
    s, (m, n) = max(zip(spectra, unfolded_shapes(shape), strict=True), key=lambda mode: len(mode[0]))
    return _level_by_median(float(s[(min(m, n) - 1) // 2]), m, n)


def unfolded_shapes(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Rows and columns of each unfolding: a mode's size, and the product of the others."""
    return [(m, math.prod(shape[:mode]) * math.prod(shape[mode + 1 :])) for mode, m in enumerate(shape)]


def detection_threshold(shape: Sequence[int], noise: float) -> float:
    """Singular value of the weakest component that can be detected (rho = 1): ``noise * prod(shape)^(1/4)``.

    Examples
    --------
    >>> detection_threshold((16, 16, 16), noise=1.0)
    8.0
    """
    return float(noise * math.prod(shape) ** 0.25)


def predicted_eigenvalue(rho: float, c: float = 0.0) -> float:
    """Where a component of strength ``rho`` shows in an unfolding of aspect ratio ``c``, in this file's units.

    ``rho + 1/rho + sqrt(c)`` if ``rho > 1``, otherwise the edge ``2 + sqrt(c)``: such a component changes nothing. The
    limit of large tensors is ``c = 0`` (Lebeau et al. 2024); ``c > 0`` is the correction for finite sizes, from the
    spiked model of a rectangular matrix (F. Benaych-Georges and R. R. Nadakuditi, J. Multivariate Anal. 111, 2012).

    Examples
    --------
    >>> predicted_eigenvalue(2.0), predicted_eigenvalue(2.0, c=0.01), predicted_eigenvalue(0.5)
    (2.5, 2.6, 2.0)
    """
    _check(rho, c)
    return (rho + 1 / rho if rho > 1 else 2.0) + math.sqrt(c)


def predicted_strength(xi: float, c: float = 0.0) -> float:
    """The rho whose :func:`predicted_eigenvalue` is ``xi``; 0 where that is within noise.

    Examples
    --------
    >>> predicted_strength(2.6, c=0.01), predicted_strength(2.0)
    (2.0, 0.0)
    """
    y = xi - math.sqrt(c)
    return (y + math.sqrt(y * y - 4)) / 2 if y > 2 else 0.0


def predicted_alignment(rho: float, c: float = 0.0) -> float:
    """Squared inner product of a component's vector with the truncated MLSVD's, for strength ``rho``, aspect ratio ``c``.

    ``1 - (1 + rho sqrt(c)) / (rho (rho + sqrt(c)))`` if ``rho > 1``, otherwise 0; ``1 - 1/rho^2`` for large tensors.
    Sources as for :func:`predicted_eigenvalue`.

    Examples
    --------
    >>> predicted_alignment(2.0), round(predicted_alignment(1.5, c=160 / 48000), 3), predicted_alignment(1.0)
    (0.75, 0.535, 0.0)
    """
    _check(rho, c)
    return 1 - (1 + rho * math.sqrt(c)) / (rho * (rho + math.sqrt(c))) if rho > 1 else 0.0


def _check(rho: float, c: float) -> None:
    check_interval("rho", rho, 0, math.inf, closed=(True, False))
    check_interval("c", c, 0, math.inf, closed=(True, False), fix="It is n_l over the product of the other sizes.")


@lru_cache(maxsize=64)
def tracy_widom_quantile(level: float) -> float:
    """What the Tracy-Widom law of real matrices exceeds with probability ``level``.

    By a shifted gamma distribution (M. Chiani, J. Multivariate Anal. 129, 2014, arXiv 1209.3394).

    Examples
    --------
    >>> [round(tracy_widom_quantile(level), 1) for level in (0.05, 0.01)]
    [1.0, 2.0]
    """
    shape, scale, shift = torch.tensor([46.446, 0.186054, 9.84801], dtype=torch.float64)
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        above = float(torch.special.gammaincc(shape, torch.tensor(middle, dtype=torch.float64)))
        low, high = (middle, high) if above > level else (low, middle)
    return float(scale * low - shift)


@dataclass(frozen=True)
class MultilinearNoiseEdge:
    """Multilinear ranks: of each unfolding the singular values that noise alone would not have.

    The edge is the semicircle's upper end, corrected for finite sizes: the largest ``s^2 / noise^2`` of an m x n
    unfolding of noise is about ``a^2 + a b^(1/3) t`` with ``a = sqrt(m - 1/2) + sqrt(n - 1/2)``,
    ``b = 1/sqrt(m - 1/2) + 1/sqrt(n - 1/2)`` and t from the Tracy-Widom law (I. M. Johnstone, Ann. Stat. 29, 2001; Z. Ma,
    Bernoulli 18, 2012). Noise alone exceeds the edge with probability ``level`` in each mode.

    Attributes
    ----------
    level
        Probability that a mode without any signal is given one, in (0, 0.5).
    noise
        Standard deviation of the noise in an entry; default: :func:`noise_level`, right if signal is in fewer than half
        of the values of the unfolding with the most.
    """

    level: float = 0.001
    noise: float | None = None

    def __post_init__(self) -> None:
        check_interval("level", self.level, 0, 0.5)
        if self.noise is not None:
            check_interval("noise", self.noise, 0, math.inf)

    def edge(self, m: int, n: int, noise: float) -> float:
        """Largest singular value that noise alone has in an m x n unfolding."""
        rows, columns = (m - 0.5) ** 0.5, (n - 0.5) ** 0.5
        spread = (1 / rows + 1 / columns) ** (1 / 3) * tracy_widom_quantile(self.level)
        return float(noise * ((rows + columns) * (rows + columns + spread)) ** 0.5)

    def choose(self, spectra: Sequence[Tensor], shape: Sequence[int]) -> tuple[int, ...]:
        """How many values stand above the edge in each mode, at most the product of the others, as in any tensor.

        ``spectra`` are all singular values of each unfolding, descending; ``shape`` the tensor's.
        """
        if len(spectra) != len(shape):
            raise ConfigError("spectra", len(spectra), f"must be one a mode of a tensor of shape {tuple(shape)}")
        noise = noise_level(spectra, shape) if self.noise is None else self.noise
        shapes = unfolded_shapes(shape)
        r = [int((s > self.edge(m, n, noise)).sum()) for s, (m, n) in zip(spectra, shapes, strict=True)]
        for _ in r:
            r = [min(own, others) for own, others in unfolded_shapes(r)]
        return tuple(r)
