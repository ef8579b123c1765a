"""What a collective takes in the latency-bandwidth model: a messages of latency alpha, b times its bytes times beta."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

Coefficients: TypeAlias = tuple[float, float]


def _rounds(processes: int) -> int:
    return math.ceil(math.log2(processes))


def _ring_all_reduce(p: int) -> Coefficients:
    return 2.0 * (p - 1), 2.0 * (p - 1) / p


def _tree_all_reduce(p: int) -> Coefficients:
    return 2.0 * _rounds(p), 2.0


def _one_ring(p: int) -> Coefficients:
    return p - 1.0, (p - 1) / p


def _binomial(p: int) -> Coefficients:
    return float(_rounds(p)), float(_rounds(p))


def _scatter_and_gather(p: int) -> Coefficients:
    return _rounds(p) + p - 1.0, 2.0 * (p - 1) / p


ALGORITHMS: dict[str, dict[str, Callable[[int], Coefficients]]] = {
    "all_reduce": {"ring": _ring_all_reduce, "tree": _tree_all_reduce},
    "all_gather": {"ring": _one_ring},
    "reduce_scatter": {"ring": _one_ring},
    "all_to_all": {"pairwise": _one_ring},
    "broadcast": {"binomial": _binomial, "scatter and all-gather": _scatter_and_gather},
}
"""Latencies and bytes of each algorithm for P processes: messages one after another on the longest path, and
bytes on it over those of the whole tensor. The tree of an all-reduce is pipelined, so that each byte goes up once
and down once (double binary trees, Sanders, Speck and Träff, Parallel Computing 35, 2009); the others are those of
Thakur, Rabenseifner and Gropp, Int. J. High Perform. Comput. Appl. 19 (2005), sections 4.1 to 4.5."""

FITTED = {name: next(iter(algorithms)) for name, algorithms in ALGORITHMS.items()}
"""The algorithm that a measured link was fitted with, and is used with again: what gloo does."""


@dataclass(frozen=True)
class Link:
    """A message of n bytes takes ``alpha_s + n beta_s_per_byte``."""

    alpha_s: float
    beta_s_per_byte: float

    @property
    def gb_per_s(self) -> float:
        """Bandwidth in 10^9 bytes a second."""
        return 1e-9 / self.beta_s_per_byte if self.beta_s_per_byte else math.inf


def seconds(
    collective: str, link: Link, processes: int, size: float, *, algorithms: Sequence[str] | None = None
) -> float:
    """Time of a collective over a tensor of ``size`` bytes in all, by the fastest algorithm; 0 for one process.

    Parameters
    ----------
    size
        Bytes of the whole tensor: what each process has before an all-reduce, a reduce-scatter or an all-to-all,
        or after an all-gather.
    algorithms
        Which there are; default all of ``ALGORITHMS``.

    Examples
    --------
    >>> seconds("all_reduce", Link(0.0, 1e-9), 4, 1e9, algorithms=["ring"])
    1.5
    """
    if processes == 1:
        return 0.0
    known = ALGORITHMS[collective]
    costs = [known[name](processes) for name in algorithms or known]
    return min(a * link.alpha_s + b * size * link.beta_s_per_byte for a, b in costs)


@dataclass(frozen=True)
class Sample:
    """One measured collective."""

    processes: int
    size: float
    seconds: float


def fit(collective: str, samples: Sequence[Sample], algorithm: str) -> Link:
    """The link that explains measured times best: least squares of relative errors, neither part negative."""
    rows = np.array([_row(collective, sample, algorithm) for sample in samples])
    alpha, beta = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    if alpha < 0 or beta < 0:
        # The other one alone.
        kept = rows[:, 1] if alpha < 0 else rows[:, 0]
        only = float(kept.sum() / np.square(kept).sum())
        return Link(0.0, only) if alpha < 0 else Link(only, 0.0)
    return Link(float(alpha), float(beta))


def _row(collective: str, sample: Sample, algorithm: str) -> tuple[float, float]:
    latencies, share = ALGORITHMS[collective][algorithm](sample.processes)
    return latencies / sample.seconds, share * sample.size / sample.seconds


def mean_error(collective: str, link: Link, samples: Sequence[Sample], algorithm: str) -> float:
    """Mean of ``|model / measured - 1|``."""
    parameters = np.array([link.alpha_s, link.beta_s_per_byte])
    rows = np.array([_row(collective, sample, algorithm) for sample in samples])
    return float(np.abs(rows @ parameters - 1).mean())
