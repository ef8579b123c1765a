"""SVD of a matrix in row blocks: hierarchical, randomized, or exact, and which of them suits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpc_oialr.errors import ConfigError, check_interval
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.communicator import Communicator, Group, communicator
from hpc_oialr.linalg.row_partition import agree, even_blocks, frobenius_norm, squared_norm
from hpc_oialr.linalg.svd import svd
from hpc_oialr.linalg.tsqr import (
    Apply,
    BlockSVD,
    Columns,
    Ledger,
    Scheme,
    Top,
    block_svd,
    blocked_qr,
    gathered,
    gathered_svd,
    tsqr,
    tsqr_svd,
    up_and_down,
)

# A sketch wider than this share of k costs about as much as the exact SVD and is less accurate.
SKETCH_SHARE = 0.25
# From about this aspect on TSQR has fewer operations one after another than one SVD of the gathered matrix:
# 4.3 on 2 ranks, 5.1 on 8, 8.1 on 64.
TSQR_ASPECT = 5
# Of the squared tolerance: what all levels below the root may spend; the root takes what is left.
SHARE_BELOW_ROOT = 0.5


@exact_arithmetic()
def distributed_svd(
    A: Tensor,
    group: Group = None,
    *,
    r: int | None = None,
    tolerance: float | None = None,
    vh: Columns = "whole",
    name: str = "matrix",
) -> BlockSVD:
    """Thin or truncated SVD of a matrix in row blocks, by the method that suits.

    A ``tolerance`` calls for :func:`hierarchical_svd`, an ``r`` so small that a sketch has at most a quarter of k
    columns for :func:`randomized_svd`. Otherwise the exact SVD, of which the leading ``r`` triplets are returned:
    :func:`~hpc_oialr.linalg.tsqr.tsqr_svd` of long matrices, :func:`~hpc_oialr.linalg.tsqr.gathered_svd` of others.

    Parameters
    ----------
    A
        This rank's rows, m_p x n, any floating dtype; bf16 and fp16 are computed in fp32.
    group
        See :func:`~hpc_oialr.linalg.communicator.communicator`.
    r, tolerance
        Triplets wanted, or relative Frobenius error allowed; neither means all.
    vh
        "whole" gives every rank all of Vh, "block" its columns only.
    name
        Named in errors.

    Raises
    ------
    NonFiniteError, WorldError
        On every rank, if any block holds NaN or Inf, or blocks do not fit together.
    ConfigError
        If ``r`` or ``tolerance`` is out of range, or both are given.

    Examples
    --------
    >>> A = torch.outer(torch.arange(6.0), torch.ones(4))
    >>> distributed_svd(A, r=1).s
    tensor([14.8324])
    """
    if r is not None or tolerance is not None:
        _check_target(r, tolerance)
    comm = communicator(group)
    A, partition = agree(A, comm, name)
    if tolerance is not None:
        return hierarchical_svd(A, comm, tolerance=tolerance, vh=vh, name=name)
    if r is not None and r + 10 <= SKETCH_SHARE * partition.k:
        return randomized_svd(A, comm, r=r, vh=vh, name=name)
    long = max(partition.m, partition.n) >= TSQR_ASPECT * partition.k
    U, s, Vh, _ = (tsqr_svd if long else gathered_svd)(A, comm, vh=vh, name=name)
    if r is None:
        return BlockSVD(U, s, Vh)
    return BlockSVD(U[:, :r].contiguous(), s[:r].clone(), Vh[:r].clone(), math.sqrt(squared_norm(s[r:])))


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
    """Leading singular triplets, by number or by error, from truncated SVDs merged up a tree.

    Every rank truncates the SVD of its rows, ``A_p ~ U_p diag(s_p) Vh_p``; two ``diag(s_p) Vh_p`` are stacked, their
    SVD truncated again, up to the root. Either ``r`` triplets are returned (fewer if k < r), or the fewest that the last
    merge allows with ``||A - U diag(s) Vh||_F <= tolerance ||A||_F``; rounding adds about the dtype's epsilon. With
    ``r``, ``shift`` more are kept below the root, for directions that only the whole matrix shows to be leading.

    The result's ``error`` is ``||A - U diag(s) Vh||_F``, not a bound: every cut is an orthogonal projection of the
    rows kept by the cuts below it, so the parts cut are orthogonal to each other and their squares add. A priori it is
    at most ``(1 + sqrt 2)^(q+1) - 1`` times the best possible one, q = ceil(log2 P) levels (the reference's bound on
    noisy blocks); with the shift usually within a few percent.

    Operations per rank ``6 m_p n^2 + 20 n^3`` and per merge an SVD of 2 (r + shift) x n. Sent per rank, in numbers:
    ``(r + shift) n`` up, at most ``(2 r + shift + n) r log2 P`` down.

    M. Iwen, B. Ong, SIAM J. Matrix Anal. Appl. 37 (2016), algorithm 1, on the transpose.
    """
    _check_target(r, tolerance)
    if shift < 0:
        raise ConfigError("shift", shift, "must be 0 or more", fix="10 is the default.")
    comm = communicator(group)
    A, _ = agree(A, comm, name)
    scheme = _Truncated(r, tolerance or 0.0, shift, levels=max(1, math.ceil(math.log2(comm.size))))
    return block_svd(up_and_down(A, comm, scheme, name, energy=squared_norm(A)), comm, vh)


def _check_target(r: int | None, tolerance: float | None) -> None:
    if (r is None) == (tolerance is None):
        given = f"r = {r}, tolerance = {tolerance}"
        raise ConfigError("target", given, "exactly one of r and tolerance must be given")
    if r is not None and r < 1:
        raise ConfigError("r", r, "must be at least 1", fix="It counts singular values.")
    if tolerance is not None:
        check_interval("tolerance", tolerance, 0, 1, closed=(True, False), fix="It is relative to ||A||_F.")


class _Truncated(Scheme):
    """``diag(s) Vh`` goes up, truncated; the ledger keeps the squares."""

    triangular = False

    def __init__(self, r: int | None, tolerance: float, shift: int, levels: int) -> None:
        self.r, self.tolerance, self.shift, self.levels = r, tolerance, shift, levels

    def split(self, X: Tensor, ledger: Ledger) -> tuple[Apply, Tensor]:
        budget = self.tolerance**2 * ledger.energy * SHARE_BELOW_ROOT / (self.levels + 1)
        Q, U, s, Vh = self._truncate(X, ledger, budget, self.shift)
        return (lambda M: Q(U @ M)), s[:, None] * Vh

    def finish(self, X: Tensor, ledger: Ledger) -> Top:
        budget = self.tolerance**2 * ledger.energy - ledger.cut
        Q, U, s, Vh = self._truncate(X, ledger, budget, 0)
        return Top(Q(U), torch.cat([s[:, None], Vh], dim=1), math.sqrt(ledger.cut))

    def _truncate(self, X: Tensor, ledger: Ledger, budget: float, shift: int) -> tuple[Apply, Tensor, Tensor, Tensor]:
        Q, R = blocked_qr(X)
        U, s, Vh = svd(R, name="a stack of factors")
        keep = fewest(s, budget) if self.r is None else min(self.r + shift, len(s))
        ledger.cut += squared_norm(s[keep:])
        return Q, U[:, :keep], s[:keep], Vh[:keep]


def fewest(s: Tensor, budget: float) -> int:
    """How many leading values must stay so that the squares of the others sum to at most ``budget``.

    >>> fewest(torch.tensor([3.0, 2.0, 1.0]), 5.0)
    1
    """
    tails = s.double().square().flip(0).cumsum(0).flip(0)
    return int((tails > budget).sum())


@exact_arithmetic()
def randomized_svd(
    A: Tensor,
    group: Group = None,
    *,
    r: int,
    oversampling: int = 10,
    power_iterations: int = 2,
    seed: int = 0,
    vh: Columns = "whole",
    name: str = "matrix",
) -> BlockSVD:
    """Leading r singular triplets from a Gaussian sketch, any shape.

    ``Q = orth(A G)`` with G n x l, l = min(r + oversampling, k); then q times ``Q = orth(A orth(A^T Q))``; SVD of
    ``Q^T A`` (l x n). Every ``orth`` is a TSQR. Every rank draws the same G from the seed; it is not sent. q = 2 is
    enough for spectra that fall slowly, 0 for ones that fall fast.

    The result's ``error`` is ``sqrt(||A||_F^2 - sum(s^2))``, the true error to within ``sqrt(epsilon) ||A||_F``, since
    ``U diag(s) Vh`` is an orthogonal projection of A.

    Operations per rank ``4 m_p n l (q + 1)`` and TSQRs of m_p x l and n_p x l. Sent per rank, in numbers:
    ``(2 q + 1) n l`` at most, and the messages of ``2 q + 2`` TSQRs of width l.

    N. Halko, P.-G. Martinsson, J. Tropp, SIAM Rev. 53 (2011), algorithms 4.4 and 5.1, theorem 10.5.
    """
    limits = {"r": (r, 1), "oversampling": (oversampling, 0), "power_iterations": (power_iterations, 0)}
    for what, (value, low) in limits.items():
        if value < low:
            raise ConfigError(what, value, f"must be at least {low}")
    comm = communicator(group)
    A, partition = agree(A, comm, name)
    width = min(r + oversampling, partition.k)
    Q = tsqr(A @ gaussian(partition.n, width, seed).to(A), comm, name=name).Q
    for _ in range(power_iterations):
        Z = tsqr(_transposed_product(A, Q, comm), comm, name=name).Q
        Q = tsqr(A @ comm.all_gather_rows(Z, even_blocks(partition.n, comm.size)), comm, name=name).Q
    V, s, Wh, _ = tsqr_svd(_transposed_product(A, Q, comm), comm, name=name)
    U, s, V = Q @ Wh[:r].mT, s[:r].contiguous(), V[:, :r]
    missed = frobenius_norm(A, comm) ** 2 - squared_norm(s)
    return BlockSVD(U, s, gathered(V, comm, partition.n, vh), math.sqrt(max(0.0, missed)))


def gaussian(n: int, width: int, seed: int) -> Tensor:
    """Standard normal numbers, n x width (float32), the same bits on every rank: from the CPU's generator."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(n, width, generator=generator, device="cpu", dtype=torch.float32)


def _transposed_product(A: Tensor, Q: Tensor, comm: Communicator) -> Tensor:
    """This rank's rows of ``A^T Q`` (n_p x l), summed over the row blocks of A and Q."""
    product = A.mT @ Q
    return comm.reduce_scatter(product.split(even_blocks(A.shape[1], comm.size)))
