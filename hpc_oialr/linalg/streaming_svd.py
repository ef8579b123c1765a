"""Truncated SVD of a matrix too large to hold, which comes in blocks of rows, each seen once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hpc_oialr.errors import ConfigError
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.row_partition import squared_norm
from hpc_oialr.linalg.svd import compute_dtype, svd


class StreamedSVD(NamedTuple):
    """Leading singular values and right vectors of an m x n matrix."""

    s: Tensor  # r, descending
    Vh: Tensor  # r x n
    error: float  # an upper bound of ||A - A V Vh||_F, see streaming_svd
    rows: int  # m

    def left(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Rows of ``U = A V / s``, a block for a block, from a second pass; ``U diag(s) Vh`` is ``A V Vh``."""
        for block in blocks:
            yield block.to(self.Vh) @ self.Vh.mT / self.s


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
        Rows of the matrix, b x n each, any b and any floating dtype; computed in fp32, or fp64 if the first block is.
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

    Memory ``2 (l + b) n`` numbers; about ``4 n (l + b)^2`` multiply-adds a block, fewest in all for b near l: shorter
    blocks are gathered to l rows first. The update of M. Brand, Linear Algebra Appl. 415 (2006), by blocks; error as in
    M. Iwen, B. Ong, SIAM J. Matrix Anal. Appl. 37 (2016).

    Examples
    --------
    >>> blocks = (torch.full((2, 3), float(i)) for i in (1, 2))
    >>> [round(float(value), 3) for value in streaming_svd(blocks, r=1).s]
    [5.477]
    """
    if r < 1 or oversampling < 0:
        fix = "oversampling must be 0 or more."
        raise ConfigError("r, oversampling", (r, oversampling), "r must be at least 1", fix=fix)
    held, cut, rows = None, 0.0, 0
    for block in _gathered(blocks, r + oversampling, name):
        rows += len(block)
        X = block if held is None else torch.cat([held, block.to(held)])
        if len(X) > 2 * X.shape[1]:
            X = torch.linalg.qr(X, mode="r").R
        _U, s, Vh = svd(X, name=f"{name}, rows up to {rows}")
        cut += squared_norm(s[r + oversampling :])
        held = s[: r + oversampling, None] * Vh[: r + oversampling]
    if held is None:
        raise ConfigError(name, "empty", "must have rows", fix="An iterator can be used once: make a new one.")
    return StreamedSVD(s[:r].clone(), Vh[:r].clone(), math.sqrt(cut + squared_norm(s[r : r + oversampling])), rows)


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
