"""Arrays as text inside a page: small, and decoded only when they are drawn."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Codes of singular values; the last one stands for none.
LEVELS, ABSENT = 65_534, 65_535
# Values further below the largest one than this are drawn there.
DEPTH = 1e-9


def floats(values: NDArray[Any]) -> str:
    """Little-endian float32 in base64; NaN stays NaN."""
    return _base64(np.asarray(values, dtype="<f4"))


def logarithms(values: NDArray[Any]) -> dict[str, Any]:
    """Positive numbers of many sizes, two bytes each.

    ``value = exp(low + (high - low) code / 65534)``: within five decades the relative error stays below 1e-4.

    Parameters
    ----------
    values
        NaN for none; of any shape.

    Examples
    --------
    >>> packed = logarithms(np.array([8.0, 2.0, np.nan]))
    >>> packed["codes"], round(packed["low"], 4)
    ('/v8AAP//', 0.6931)
    """
    known = np.isfinite(values)
    largest = float(np.max(values, where=known, initial=0.0)) or 1.0
    logs = np.log(np.clip(np.where(known, values, largest), DEPTH * largest, None))
    low, high = (float(logs.min()), float(logs.max())) if logs.size else (0.0, 0.0)
    codes = np.rint((logs - low) / ((high - low) or 1.0) * LEVELS)
    return {"low": low, "high": high, "codes": _base64(np.where(known, codes, ABSENT).astype("<u2"))}


def _base64(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
