"""The spectrum of pure noise: the Marchenko-Pastur law and what stands above it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


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
    long, short = max(m, n), min(m, n)
    sigma = median_singular_value / (long * marchenko_pastur_median(short / long)) ** 0.5
    return float(sigma * (m**0.5 + n**0.5))
