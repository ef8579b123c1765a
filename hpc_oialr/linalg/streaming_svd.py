"""Truncated SVD of a matrix too large to hold, which comes in blocks of rows, each seen once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hpc_oialr.errors import ConfigError, NonFiniteError
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.row_partition import squared_norm
from hpc_oialr.linalg.svd import compute_dtype, count_non_finite, svd


class StreamedSVD(NamedTuple):
    """Leading singular values and right vectors of an m x n matrix."""

    s: Tensor  # r, descending
    Vh: Tensor  # r x n
    error: float  # an upper bound of ||A - A V Vh||_F, see streaming_svd
    rows: int  # m

    def left(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Rows of ``U = A V / s``, block by block, in a second pass; 0 for values that are 0 but for rounding."""
        known = self.s > self.s[0] * torch.finfo(self.s.dtype).eps
        inverse = torch.where(known, 1 / self.s, 0)
        for block in blocks:
            yield block.to(self.Vh) @ self.Vh.mT * inverse


@exact_arithmetic()
def streaming_svd(blocks: Iterable[Tensor], *, r: int, oversampling: int = 10, name: str = "matrix") -> StreamedSVD:
    """The leading ``r`` singular values and right vectors, in one pass over blocks of rows.

    Held are ``l = r + oversampling`` rows ``diag(s) Vh``: each new block is stacked below them, and the SVD of both
    truncated to l again, at the end to r. Every cut is orthogonal to what is kept, so the squares of all cuts add to
    that of ``||A - Q diag(s) Vh||_F`` for some Q with orthonormal columns: the result's ``error``. It is exact for a
    matrix of rank up to l.

    Parameters
    ----------
    blocks
        Rows of the matrix, b x n each, any b and any floating dtype. Computed in fp64; the result is in fp32 unless the
        first block is in fp64.
    r, oversampling
        Triplets wanted, and how many more are held until the end.
    name
        Named in errors.

    Raises
    ------
    ConfigError
        If ``r`` or ``oversampling`` is out of range, no row comes, or widths differ.
    NonFiniteError
        If a block holds NaN or Inf.

    Memory ``2 (l + b) n`` numbers; about ``2 n (l + b)^2`` multiply-adds a block (of fp64 data several times as many),
    fewest in all for b near l: shorter blocks are gathered to l rows first. The update of M. Brand, Linear Algebra Appl.
    415 (2006), by blocks; error as in M. Iwen, B. Ong, SIAM J. Matrix Anal. Appl. 37 (2016).

    Examples
    --------
    >>> blocks = (torch.full((2, 3), float(i)) for i in (1, 2))
    >>> [round(float(value), 3) for value in streaming_svd(blocks, r=1).s]
    [5.477]
    """
    if r < 1 or oversampling < 0:
        fix = "oversampling must be 0 or more."
        raise ConfigError("r, oversampling", (r, oversampling), "r must be at least 1", fix=fix)
    held, cut, rows, dtype = None, 0.0, 0, torch.float32
    for block in _gathered(blocks, r + oversampling, name):
        if bad := count_non_finite(block):
            where = f"rows {rows} to {rows + len(block) - 1}"
            raise NonFiniteError(f"{name} holds {bad} NaN or Inf in {where}; an SVD needs finite ones.")
        if held is None:
            dtype = compute_dtype(block.dtype)
        rows += len(block)
        X = block.double() if held is None else torch.cat([held, block.double()])
        held, lost = _leading_rows(X, r + oversampling, exact=dtype == torch.float64)
        cut += lost
    if held is None:
        raise ConfigError(name, "empty", "must have rows", fix="An iterator can be used once: make a new one.")
    _U, s, Vh = svd(held, name=name)
    return StreamedSVD(s[:r].to(dtype), Vh[:r].to(dtype), math.sqrt(cut + squared_norm(s[r:])), rows)


def _leading_rows(X: Tensor, most: int, *, exact: bool) -> tuple[Tensor, float]:
    """``diag(s) Vh`` of the leading ``most`` triplets, and the squares of the other values; fp64.

    Unless ``exact``, by the eigenvectors of ``X X^T``, several times faster: errors are 1e-8 of the largest value, less
    than those of fp32 data.
    """
    if len(X) > 2 * X.shape[1]:
        X = torch.linalg.qr(X, mode="r").R
    if exact:
        _U, s, Vh = svd(X)
        return s[:most, None] * Vh[:most], squared_norm(s[most:])
    squares, Q = torch.linalg.eigh(X @ X.mT)
    return Q[:, -most:].mT @ X, float(squares[:-most].clamp_min(0).sum())


def _gathered(blocks: Iterable[Tensor], fewest: int, name: str) -> Iterator[Tensor]:
    """The same rows, at least ``fewest`` at a time but for the last."""
    waiting: list[Tensor] = []
    width = None
    for block in blocks:
        if block.dim() != 2 or width not in (None, block.shape[1]):
            rule = "must have two axes, and as many columns as the blocks before"
            raise ConfigError(name, tuple(block.shape), rule, fix="Pass rows of one matrix.")
        width = block.shape[1]
        if len(block):
            waiting.append(block.detach().to(compute_dtype(block.dtype)))
        if sum(map(len, waiting)) >= fewest:
            yield torch.cat(waiting)
            waiting = []
    if waiting:
        yield torch.cat(waiting)
