"""Factored or merged: which is cheaper for these m, n, r and this many tokens."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from hpc_oialr.errors import ConfigError, DataError
from hpc_oialr.system_errors import read_json

log = logging.getLogger(__name__)


def dense_cost(tokens: int, m: int, n: int) -> int:
    """Multiply-adds of a dense layer, forward and backward: ``3 B m n``."""
    return 3 * tokens * m * n


def factored_cost(tokens: int, m: int, n: int, r: int) -> int:
    """Multiply-adds of a factored layer with only S trained, forward and backward.

    ``2 B r (m + n) + B r^2 + r^2 (m + n)`` where ``U S`` and ``S Vh`` are formed first, which is cheaper for more than
    ``(m + n) / 2`` tokens; ``2 B r (m + n) + 3 B r^2`` for fewer, by three products in a row.
    """
    core = r * r * (tokens + m + n) if folds(tokens, m, n) else 3 * tokens * r * r
    return 2 * tokens * r * (m + n) + core


def folds(tokens: int, m: int, n: int) -> bool:
    """Whether forming ``U S`` and ``S Vh`` in each pass saves operations: ``B > (m + n) / 2``."""
    return 2 * tokens > m + n


def merged_cost(tokens: int, m: int, n: int, r: int) -> int:
    """Multiply-adds when ``W = U S Vh`` is built first and its gradient projected back to S.

    A dense layer, ``S Vh`` and ``U (S Vh)`` forward, the two products of ``U^T dW Vh^T`` backward.
    """
    return dense_cost(tokens, m, n) + 2 * m * n * r + 2 * n * r * r


def prefer_factored(tokens: int, m: int, n: int, r: int, *, crossover: float = 1.0) -> bool:
    """Whether factored execution is faster for this many rows of input (for a convolution: output positions).

    ``crossover`` is the ratio of factored to merged multiply-adds at which both take the same time: 1 by the count
    alone, less where a measurement found the thin products of the factored form less efficient.

    >>> prefer_factored(1024, 768, 768, 192), prefer_factored(1024, 768, 768, 700)
    (True, False)
    """
    # Decided without the tokens where possible: they are a symbol under torch.export and torch.compile, and a
    # comparison would tie the program to this side of the border.
    if factored_cost(1, m, n, r) <= crossover * dense_cost(1, m, n):
        return True
    if torch.compiler.is_exporting():
        return False
    return factored_cost(tokens, m, n, r) <= crossover * merged_cost(tokens, m, n, r)


def tucker_cost(tokens: int, shape: tuple[int, int, int], r: tuple[int, int], *, inputs: int = 1) -> int:
    """Multiply-adds of a Tucker convolution with only S trained, forward and backward.

    ``2 B (B' c r_in + m r_out) + 3 B K r_out r_in`` for B output positions, ``inputs`` B' input positions for each of
    them, and a kernel of ``shape`` (m, c, K): output channels, input channels, places.
    """
    (m, channels, places), (r_out, r_in) = shape, r
    return tokens * (2 * (inputs * channels * r_in + m * r_out) + 3 * places * r_out * r_in)


def prefer_tucker(
    tokens: int, shape: tuple[int, int, int], r: tuple[int, int], *, inputs: int = 1, crossover: float = 1.0
) -> bool:
    """:func:`prefer_factored` of a Tucker convolution; arguments as of :func:`tucker_cost`.

    >>> prefer_tucker(1024, (64, 64, 9), (16, 16)), prefer_tucker(1024, (64, 64, 9), (64, 64))
    (True, False)
    """
    (m, channels, places), (r_out, r_in) = shape, r
    n, each = channels * places, tucker_cost(1, shape, r, inputs=inputs)
    if each <= crossover * dense_cost(1, m, n):
        return True
    if torch.compiler.is_exporting():
        return False
    # The weight is built by the core's product with Vh, then with U; its gradient goes back the same way.
    return tokens * each <= crossover * (dense_cost(tokens, m, n) + 2 * r_out * n * (m + r_in))


def crossover_by_dtype(path: str | Path) -> dict[torch.dtype, float]:
    """:func:`measured_crossover` for each dtype a layer may run in; that of float32 where none is measured."""
    found = {torch.float32: measured_crossover(path)}
    # fp16 goes through the same units as bf16, and the benchmark has no rows of its own for it, nor for float64.
    rows_of = {torch.bfloat16: "bfloat16", torch.float16: "bfloat16", torch.float64: "float64"}
    for dtype, name in rows_of.items():
        try:
            found[dtype] = measured_crossover(path, name)
        except ConfigError:
            found[dtype] = found[torch.float32]
            if dtype == torch.bfloat16:
                log.warning(
                    "%s holds no rows of bfloat16: layers that run in bf16 or fp16 are factored or merged by its "
                    "float32 rows. Run python -m benchmarks.layer with both dtypes.",
                    path,
                )
    return found


def measured_crossover(path: str | Path, dtype: str = "float32") -> float:
    """The crossover from rows of ``dtype`` in a result file of ``python -m benchmarks.layer --out FILE``; at most 1.

    The logarithm of factored time over merged time is fitted as linear in the ratio of their multiply-adds.
    """
    fix = "Run python -m benchmarks.layer."
    try:
        rows = [row for row in read_json(Path(path))["rows"] if row["dtype"] == dtype]
    except (DataError, TypeError, KeyError) as error:
        rule = f"must be a number, or the result file of that benchmark ({error})"
        raise ConfigError("crossover", str(path), rule, fix=fix) from None
    if not rows:
        raise ConfigError("crossover", str(path), f"must hold rows of dtype {dtype}", fix=fix)
    costs = [(row["tokens"], row["m"], row["n"], row["r"]) for row in rows]
    flops = np.array([factored_cost(*c) / merged_cost(*c) for c in costs])
    slower = np.log([row["time_ratio"] / row["rebuild_ratio"] for row in rows])
    slope, offset = np.polyfit(flops, slower, 1)
    return float(np.clip(-offset / slope, 0.0, 1.0)) if slope > 0 else 1.0
