"""The ways to factorise a matrix in row blocks, each a type that knows its settings, memory and work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from hpc_oialr.errors import ConfigError
from hpc_oialr.linalg.hierarchical import check_target
from hpc_oialr.linalg.local_qr import BLOCK_SQUARES
from hpc_oialr.linalg.randomized import check_sketch
from hpc_oialr.linalg.row_partition import RowPartition, even_blocks

# Of n x n arrays alive at once while LAPACK or cuSOLVER does the SVD of an n x n matrix, workspace included.
SVD_SQUARES = 10
# Q of a tall matrix in factors, and a product with it: a geometric series over the blocked QR's levels.
BLOCKED = 1 / (1 - 1 / BLOCK_SQUARES)


@dataclass(frozen=True, kw_only=True)
class _Exact:
    """All k triplets; with ``r`` or ``tolerance`` the leading ones of them are returned.

    Parameters
    ----------
    r
        Triplets to return.
    tolerance
        Relative Frobenius error of what is returned, in [0, 1).
    """

    r: int | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.r is not None or self.tolerance is not None:
            check_target(self.r, self.tolerance, 0)


@dataclass(frozen=True, kw_only=True)
class Gather(_Exact):
    """One process does it all: :func:`~hpc_oialr.linalg.tsqr.gathered_svd`."""

    def numbers(self, partition: RowPartition) -> int:
        """Peak of process 0, in numbers, beside its input block."""
        m, n, k = partition.m, partition.n, partition.k
        return 2 * m * n + 2 * (m + n) * k + SVD_SQUARES * k * k

    def operations(self, partition: RowPartition) -> float:
        """Floating-point operations one after another."""
        return 6.0 * partition.m * partition.n * partition.k + 20.0 * partition.k**3


@dataclass(frozen=True, kw_only=True)
class Tsqr(_Exact):
    """QR up a tree: :func:`~hpc_oialr.linalg.tsqr.tsqr_svd`."""

    def numbers(self, partition: RowPartition) -> int:
        """Peak of the fullest process, in numbers, beside its input block."""
        rows, n = _long_and_short(partition)
        squares = SVD_SQUARES + 2 + 2 * _levels(partition)
        tall = int(2 * BLOCKED * rows * n) + _block(rows, n) + squares * n * n
        return (
            tall
            if partition.m >= partition.n
            else max(tall + rows * n, 3 * rows * n) + 2 * partition.m * partition.n
        )

    def operations(self, partition: RowPartition) -> float:
        """Floating-point operations one after another."""
        rows, n = _long_and_short(partition)
        return 6.0 * rows * n * n + (7.0 * _levels(partition) + 26.0) * n**3


@dataclass(frozen=True, kw_only=True)
class Hierarchical:
    """Truncated SVDs up a tree: :func:`~hpc_oialr.linalg.hierarchical.hierarchical_svd` has the fields."""

    r: int | None = None
    tolerance: float | None = None
    shift: int = 10

    def __post_init__(self) -> None:
        check_target(self.r, self.tolerance, self.shift)

    def numbers(self, partition: RowPartition) -> int:
        """Peak of the fullest process, in numbers, beside its input block; with a tolerance for r = k."""
        rows, n = max(partition.rows), partition.n
        carried = min(partition.k, n if self.r is None else self.r + self.shift)
        height = min(rows, n)
        leaf = int(BLOCKED * rows * n) + _block(rows, n) + 4 * height * n + SVD_SQUARES * height**2
        return leaf + (4 + 2 * _levels(partition)) * carried * n + 2 * rows * carried

    def operations(self, partition: RowPartition) -> float:
        """Floating-point operations one after another; with a tolerance for r = k."""
        rows, n = max(partition.rows), partition.n
        carried = min(partition.k, n if self.r is None else self.r + self.shift)
        return 6.0 * rows * n * min(rows, n) + 20.0 * n**3 + _levels(partition) * 30.0 * n * carried**2


@dataclass(frozen=True, kw_only=True)
class Randomized:
    """Gaussian sketch: :func:`~hpc_oialr.linalg.randomized.randomized_svd` has the fields."""

    r: int
    oversampling: int = 10
    power_iterations: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_sketch(self.r, self.oversampling, self.power_iterations)

    def numbers(self, partition: RowPartition) -> int:
        """Peak of the fullest process, in numbers, beside its input block."""
        rows, n, width = max(partition.rows), partition.n, min(self.r + self.oversampling, partition.k)
        squares = SVD_SQUARES + 2 + 2 * _levels(partition)
        return 6 * rows * width + 8 * n * width + squares * width * width

    def operations(self, partition: RowPartition) -> float:
        """Floating-point operations one after another."""
        rows, n, width = max(partition.rows), partition.n, min(self.r + self.oversampling, partition.k)
        products = 4.0 * rows * n * width * (self.power_iterations + 1)
        orthogonal = 6.0 * (rows + n / len(partition.rows)) * width**2 + 7.0 * _levels(partition) * width**3
        return products + (self.power_iterations + 1) * orthogonal + 26.0 * width**3


Method: TypeAlias = Gather | Tsqr | Hierarchical | Randomized


def _levels(partition: RowPartition) -> int:
    return math.ceil(math.log2(len(partition.rows)))


def _long_and_short(partition: RowPartition) -> tuple[int, int]:
    """Rows of the fullest block and columns, of the matrix or, if it is wide, of its transpose."""
    if partition.m >= partition.n:
        return max(partition.rows), partition.n
    return even_blocks(partition.n, len(partition.rows))[0], partition.m


def _block(rows: int, n: int) -> int:
    """LAPACK's copy of a block of the blocked QR and its Q."""
    return min(rows * n, 2 * BLOCK_SQUARES * n * n)


def check_method(method: object) -> None:
    """Raise :class:`ConfigError` for what is none of the types."""
    if not isinstance(method, Method):
        rule = "must be a Gather, Tsqr, Hierarchical or Randomized"
        raise ConfigError("method", method, rule, fix="E.g. method=Tsqr(); None lets choose() decide.")
