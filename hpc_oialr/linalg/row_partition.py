"""Which rows of a matrix each process holds; checked and made known by one small all-reduce."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_oialr.errors import ConfigError, NonFiniteError, WorldError
from hpc_oialr.linalg.communicator import Communicator
from hpc_oialr.linalg.svd import compute_dtype, count_non_finite

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class RowPartition:
    """Row blocks of an m x n matrix.

    Attributes
    ----------
    rows
        Height of each process's block; 0 is allowed.
    n
        Number of columns.
    """

    rows: tuple[int, ...]
    n: int

    @property
    def m(self) -> int:
        """Rows of the whole matrix."""
        return sum(self.rows)

    @property
    def k(self) -> int:
        """Singular values."""
        return min(self.m, self.n)

    def span(self, rank: int) -> slice:
        """Rows of the whole matrix that process ``rank`` holds."""
        start = sum(self.rows[:rank])
        return slice(start, start + self.rows[rank])


def even_blocks(length: int, parts: int) -> list[int]:
    """Sizes that differ by at most one, larger ones first.

    Examples
    --------
    >>> even_blocks(10, 4)
    [3, 3, 2, 2]
    """
    return [length // parts + (p < length % parts) for p in range(parts)]


def block_of(length: int, parts: int, index: int) -> slice:
    """The ``index``-th of :func:`even_blocks`."""
    sizes = even_blocks(length, parts)
    return slice(sum(sizes[:index]), sum(sizes[: index + 1]))


def agree(A: Tensor, comm: Communicator, name: str) -> tuple[Tensor, RowPartition]:
    """Check a process's block and tell all the others its shape; every process raises if one must.

    Parameters
    ----------
    A
        This process's rows, m_p x n; any floating dtype, the same on all processes.
    name
        Named in errors.

    Returns
    -------
    The block in float32 or float64, contiguous, and the partition.

    Raises
    ------
    NonFiniteError
        If any block holds NaN or Inf.
    WorldError
        If the blocks do not fit together: other widths or dtypes.
    ConfigError
        If a block is no matrix of floating-point numbers.

    Notes
    -----
    One all-reduce of ``32 P`` bytes.
    """
    table = torch.zeros(comm.size, 4, dtype=torch.int64, device=A.device)
    # Rows, columns, dtype, number of values that are not finite; -1 for what cannot be told.
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
            rule = f"must have 2 dimensions on every process; process {rank}'s block has {columns}"
            raise ConfigError(name, f"{columns}-d", rule, fix="Flatten it to (leading) x (the rest).")
        if dtype < 0:
            rule = f"must be float64, float32, float16 or bfloat16; process {rank}'s block is none of them"
            raise ConfigError(f"{name}.dtype", "other", rule, fix="Cast it first.")
    _check_equal([entry[1] for entry in entries], f"the blocks of {name} have widths")
    _check_equal([str(_DTYPES[entry[2]]) for entry in entries], f"the blocks of {name} have dtypes")
    bad = {rank: entry[3] for rank, entry in enumerate(entries) if entry[3]}
    if bad:
        total = sum(max(rows, 0) * columns for rows, columns, *_ in entries)
        where = ", ".join(f"{count} on process {rank}" for rank, count in bad.items())
        raise NonFiniteError(
            f"{name} holds {sum(bad.values())} NaN or Inf among {total} values ({where}); an SVD needs finite "
            "ones. Lower the learning rate, clip gradients, or resume from an earlier checkpoint."
        )


def _check_equal(values: list[int] | list[str], what: str) -> None:
    if len(set(values)) > 1:
        listed = ", ".join(f"{value} (process {rank})" for rank, value in enumerate(values))
        raise WorldError(f"{what} {listed}; must be equal. Pass blocks of rows of one matrix.")


def transpose_blocks(A: Tensor, comm: Communicator, partition: RowPartition) -> Tensor:
    """Row blocks of the transpose, cut by :func:`even_blocks`; no process sees the whole matrix.

    Parameters
    ----------
    A
        This process's rows, m_p x n.

    Returns
    -------
    Tensor
        n_p x m, contiguous.

    Notes
    -----
    One all-to-all; each process sends ``m_p (n - n_p)`` numbers.
    """
    widths = even_blocks(partition.n, comm.size)
    incoming = [A.new_empty(rows, widths[comm.rank]) for rows in partition.rows]
    received = comm.all_to_all(A.split(widths, dim=1), incoming)
    return torch.cat(received).mT.contiguous()
