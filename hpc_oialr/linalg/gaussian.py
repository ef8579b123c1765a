"""Gaussian numbers by position: entry (i, j) depends on the seed, i and j only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpc_oialr.linalg.splitmix import INCREMENT, mix, shift_right

COLUMN_BITS = 31
# Made at a time, so that the integers on the way take 3 MB and not six times the result.
PIECE_VALUES = 1 << 16


def gaussian_rows(
    rows: slice,
    columns: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Rows of a matrix of independent standard normal numbers that nobody has to store or send.

    ``z_ij = sqrt(-2 ln u) cos(2 pi v)``, u and v hashed from (seed, i, j).

    Parameters
    ----------
    rows
        Rows wanted, ``slice(start, stop)``.
    columns
        Number of columns, below 2^31; more of them leave the earlier ones as they are.
    seed
        Any integer.

    Returns
    -------
    Tensor
        (stop - start) x columns.

    Notes
    -----
    About 30 integer and 4 transcendental operations a number; computed in float64 and then rounded.
    """
    height = max(1, PIECE_VALUES // max(columns, 1))
    out = torch.empty(rows.stop - rows.start, columns, dtype=dtype, device=device)
    for start in range(0, len(out), height):
        piece = out[start : start + height]
        first = rows.start + start
        piece.copy_(_gaussian(torch.arange(first, first + len(piece), device=device), columns, seed))
    return out


def _gaussian(i: Tensor, columns: int, seed: int) -> Tensor:
    j = torch.arange(columns, device=i.device)
    counter = ((i[:, None] << COLUMN_BITS) + j) * 2
    key = mix(torch.tensor(seed, device=i.device) * INCREMENT + 1)
    u, v = (_unit(mix((counter + half) * INCREMENT + key)) for half in (0, 1))
    return (-2.0 * torch.log(u)).sqrt() * torch.cos(2.0 * math.pi * v)


def _unit(z: Tensor) -> Tensor:
    """The upper 53 bits as a number in (0, 1]."""
    return (shift_right(z, 11) + 1).double() * 2.0**-53
