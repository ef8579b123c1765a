"""Truncated SVD of a matrix in row blocks by merging truncated SVDs up a tree."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpc_oialr.errors import ConfigError, check_interval
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.blocks import squared_norm
from hpc_oialr.linalg.communicator import Group
from hpc_oialr.linalg.groups import communicator
from hpc_oialr.linalg.local_qr import Apply, blocked_qr
from hpc_oialr.linalg.row_partition import agree
from hpc_oialr.linalg.svd import svd
from hpc_oialr.linalg.tree import Ledger, Top, up_and_down
from hpc_oialr.linalg.tsqr import BlockSVD, Columns, block_svd

# Of the tolerance, squared: what all levels below the root may spend; the root takes what is left.
SHARE_BELOW_ROOT = 0.5


@exact_arithmetic()
def hierarchical_svd(
    A: Tensor,
    group: Group = None,
    *,
    r: int | None = None,
    tolerance: float | None = None,
    shift: int = 10,
    vh: Columns = "whole",
    name: str = "matrix",
) -> BlockSVD:
    """Leading singular triplets, by number or by error.

    Every process cuts the SVD of its rows, ``A_p ~ U_p diag(s_p) Vh_p``; two ``diag(s_p) Vh_p`` are stacked,
    their SVD cut again, up to the root.

    Parameters
    ----------
    A
        This process's rows, m_p x n; uneven, empty, or fewer than n.
    group
        See :func:`~hpc_oialr.linalg.communicator.communicator`.
    r
        Triplets to return, >= 1 (fewer if k < r). Give this or ``tolerance``.
    tolerance
        ``||A - U diag(s) Vh||_F <= tolerance ||A||_F``, in [0, 1), with the fewest triplets the last merge
        allows; rounding adds about the dtype's epsilon.
    shift
        With ``r``: triplets carried beyond r until the root, a safety for directions that only the whole
        matrix shows to be leading.
    vh, name
        As for :func:`~hpc_oialr.linalg.tsqr.tsqr_svd`.

    Returns
    -------
    BlockSVD
        ``error`` is ``||A - U diag(s) Vh||_F``, not a bound: every cut is an orthogonal projection of the
        rows kept by the cuts below it, so the parts cut are orthogonal to each other and their squares add.

    Raises
    ------
    ConfigError
        If not exactly one of ``r`` and ``tolerance`` is given, or it is out of range.
    NonFiniteError
        On every process, as for TSQR.

    Notes
    -----
    Operations per process ``6 m_p n^2 + 20 n^3`` and per merge an SVD of 2 (r + shift) x n. Sent per process,
    in numbers: ``(r + shift) n`` up, at most ``(2 r + shift + n) r log2 P`` down.

    A priori the error is at most ``(1 + sqrt 2)^(q+1) - 1`` times the best possible one, q = ceil(log2 P)
    levels (the reference's bound on noisy blocks); with the shift it is usually within a few percent.

    References
    ----------
    M. Iwen, B. Ong, SIAM J. Matrix Anal. Appl. 37 (2016), algorithm 1, on the transpose.
    """
    check_target(r, tolerance, shift)
    comm = communicator(group)
    A, _ = agree(A, comm, name)
    levels = math.ceil(math.log2(comm.size)) if comm.size > 1 else 1
    scheme = _Truncated(r, tolerance, shift, levels)
    return block_svd(up_and_down(A, comm, scheme, name, energy=squared_norm(A)), comm, vh)


def check_target(r: int | None, tolerance: float | None, shift: int) -> None:
    """Raise :class:`ConfigError` unless exactly one target is given and all values are in range."""
    if (r is None) == (tolerance is None):
        given = f"r = {r}, tolerance = {tolerance}"
        raise ConfigError("target", given, "exactly one of r and tolerance must be given")
    if r is not None and r < 1:
        raise ConfigError("r", r, "must be at least 1", fix="It counts singular values.")
    if tolerance is not None:
        check_interval("tolerance", tolerance, 0, 1, closed=(True, False), fix="It is relative to ||A||_F.")
    if shift < 0:
        raise ConfigError("shift", shift, "must be 0 or more", fix="10 is the default.")


class _Truncated:
    """``diag(s) Vh`` goes up, cut; the ledger keeps the squares."""

    triangular = False

    def __init__(self, r: int | None, tolerance: float | None, shift: int, levels: int) -> None:
        self.r, self.tolerance, self.shift, self.levels = r, tolerance, shift, levels

    def split(self, X: Tensor, ledger: Ledger) -> tuple[Apply, Tensor]:
        Q, R = blocked_qr(X)
        U, s, Vh = svd(R, name="a stack of factors")
        budget = (self.tolerance or 0.0) ** 2 * ledger.energy * SHARE_BELOW_ROOT / (self.levels + 1)
        keep = fewest(s, budget) if self.r is None else min(self.r + self.shift, len(s))
        ledger.cut += squared_norm(s[keep:])
        return (lambda M: Q(U[:, :keep] @ M)), s[:keep, None] * Vh[:keep]

    def finish(self, X: Tensor, ledger: Ledger) -> Top:
        Q, R = blocked_qr(X)
        U, s, Vh = svd(R, name="the last stack of factors")
        budget = (self.tolerance or 0.0) ** 2 * ledger.energy - ledger.cut
        keep = fewest(s, budget) if self.r is None else min(self.r, len(s))
        ledger.cut += squared_norm(s[keep:])
        return Top(Q(U[:, :keep]), torch.cat([s[:, None], Vh], dim=1)[:keep], math.sqrt(ledger.cut))


def fewest(s: Tensor, budget: float) -> int:
    """How many leading values must stay so that the squares of the others sum to at most ``budget``.

    Examples
    --------
    >>> fewest(torch.tensor([3.0, 2.0, 1.0]), 5.0)
    1
    """
    tails = s.double().square().flip(0).cumsum(0).flip(0)
    return int((tails > budget).sum())
