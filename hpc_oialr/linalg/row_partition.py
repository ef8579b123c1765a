"""Which rows of a matrix each rank holds; norms of matrices in blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_oialr.errors import ConfigError, NonFiniteError, WorldError
from hpc_oialr.linalg.communicator import Communicator, Group, communicator
from hpc_oialr.linalg.svd import compute_dtype, count_non_finite, row_pieces

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class RowPartition:
    """Row blocks of an m x n matrix: ``rows[p]`` rows, maybe 0, on rank p."""

    rows: tuple[int, ...]
    n: int

    @property
    def m(self) -> int:
        """Rows of the whole matrix."""
        return sum(self.rows)

    @property
    def k(self) -> int:
        """Number of singular values."""
        return min(self.m, self.n)

    def span(self, rank: int) -> slice:
        """Rows of the whole matrix that ``rank`` holds."""
        start = sum(self.rows[:rank])
        return slice(start, start + self.rows[rank])


def even_blocks(length: int, parts: int) -> list[int]:
    """Sizes that differ by at most one, larger ones first.

    >>> even_blocks(10, 4)
    [3, 3, 2, 2]
    """
    return [length // parts + (p < length % parts) for p in range(parts)]


def block_of(length: int, parts: int, index: int) -> slice:
    """The ``index``-th of :func:`even_blocks`."""
    return RowPartition(tuple(even_blocks(length, parts)), 0).span(index)


def agree(A: Tensor, comm: Communicator, name: str) -> tuple[Tensor, RowPartition]:
    """This rank's block in float32 or float64, contiguous, and the partition; one all-reduce of ``32 P`` bytes.

    Raises :class:`NonFiniteError`, :class:`WorldError` or :class:`ConfigError` on every rank, if any block holds NaN or
    Inf, if widths or dtypes differ, or if a block is no floating-point matrix.
    """
    table = torch.zeros(comm.size, 4, dtype=torch.int64, device=A.device)
    # Rows, columns, dtype, number of values that are not finite; -1 for what does not apply.
    dtype = _DTYPES.index(A.dtype) if A.dtype in _DTYPES else -1
    rows, columns = A.shape if A.dim() == 2 else (-1, A.dim())
    mine = [rows, columns, dtype, count_non_finite(A) if dtype >= 0 else 0]
    table[comm.rank] = torch.tensor(mine, device=A.device)
    entries: list[list[int]] = comm.all_reduce(table).tolist()
    _check(entries, name)
    partition = RowPartition(tuple(entry[0] for entry in entries), entries[0][1])
    return A.detach().to(compute_dtype(A.dtype)).contiguous(), partition


def _check(entries: list[list[int]], name: str) -> None:
    for rank, (rows, columns, dtype, _) in enumerate(entries):
        if rows < 0:
            rule = f"must have 2 dimensions on every rank; rank {rank}'s block has {columns}"
            raise ConfigError(name, f"{columns}-d", rule, fix="Flatten it to (leading) x (the rest).")
        if dtype < 0:
            rule = f"must be float64, float32, float16 or bfloat16; rank {rank}'s block is none of them"
            raise ConfigError(f"{name}.dtype", "other", rule, fix="Cast it first.")
    widths, dtypes = [entry[1] for entry in entries], [_DTYPES[entry[2]] for entry in entries]
    for what, values in (("widths", widths), ("dtypes", dtypes)):
        if len(set(values)) > 1:
            listed = ", ".join(f"{value} (rank {rank})" for rank, value in enumerate(values))
            raise WorldError(
                f"the blocks of {name} have {what} {listed}; must be equal. Pass blocks of rows of one matrix."
            )
    bad = {rank: entry[3] for rank, entry in enumerate(entries) if entry[3]}
    if bad:
        total = sum(rows * columns for rows, columns, *_ in entries)
        where = ", ".join(f"{count} on rank {rank}" for rank, count in bad.items())
        raise NonFiniteError(
            f"{name} holds {sum(bad.values())} NaN or Inf among {total} values ({where}); an SVD needs finite "
            "ones. Lower the learning rate, clip gradients, or resume from an earlier checkpoint."
        )


def transpose_blocks(A: Tensor, comm: Communicator, partition: RowPartition) -> Tensor:
    """Row blocks (n_p x m) of the transpose, cut by :func:`even_blocks`; no rank sees the whole matrix.

    One all-to-all; each rank sends ``m_p (n - n_p)`` numbers.
    """
    widths = even_blocks(partition.n, comm.size)
    incoming = [A.new_empty(rows, widths[comm.rank]) for rows in partition.rows]
    received = comm.all_to_all(A.split(widths, dim=1), incoming)
    return torch.cat(received).mT.contiguous()


def squared_norm(A: Tensor) -> float:
    """``||A||_F^2`` of one rank's block, summed in float64."""
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in row_pieces(A.detach())]
    return float(torch.stack(norms).square().sum())


def frobenius_norm(A: Tensor, group: Group = None) -> float:
    """``||A||_F`` for A in blocks of any shape: one all-reduce of one number."""
    total = torch.tensor(squared_norm(A), dtype=torch.float64, device=A.device)
    return math.sqrt(float(communicator(group).all_reduce(total)))
