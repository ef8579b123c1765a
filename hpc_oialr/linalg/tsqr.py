"""Tall-skinny QR and the exact SVD of a matrix in row blocks."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.communicator import Communicator, Group
from hpc_oialr.linalg.groups import communicator
from hpc_oialr.linalg.local_qr import Apply, blocked_qr
from hpc_oialr.linalg.row_partition import agree, block_of, even_blocks, transpose_blocks
from hpc_oialr.linalg.svd import svd
from hpc_oialr.linalg.tree import Ledger, Top, up_and_down

Columns = Literal["whole", "block"]


class BlockSVD(NamedTuple):
    """``A = U diag(s) Vh`` for A in row blocks.

    Attributes
    ----------
    U
        This process's rows, m_p x k.
    s
        k, descending, on every process the same bits.
    Vh
        k x n, on every process the same bits; or this process's columns, cut by ``even_blocks(n, P)``.
    error
        ``||A - U diag(s) Vh||_F`` from what was cut; 0 where nothing was. Rounding is not included.
    """

    U: Tensor
    s: Tensor
    Vh: Tensor
    error: float = 0.0


class BlockQR(NamedTuple):
    """``A = Q R``: this process's rows of Q (m_p x k), and R (k x n), the same bits on every process."""

    Q: Tensor
    R: Tensor


@exact_arithmetic()
def tsqr(A: Tensor, group: Group = None, *, name: str = "matrix") -> BlockQR:
    """QR of a matrix in row blocks, on any number of processes.

    Parameters
    ----------
    A
        This process's rows, m_p x n; uneven, empty, or fewer than n.
    group
        See :func:`~hpc_oialr.linalg.communicator.communicator`.
    name
        Named in errors.

    Raises
    ------
    NonFiniteError
        On every process, if any block holds NaN or Inf.

    Notes
    -----
    Operations per process: ``6 m_p n^2 + 20/3 n^3 log2 P``. Bytes sent per process, in numbers: at most
    ``n^2 / 2`` up and ``2 n^2 log2 P`` down the tree. Backward stable, whatever the condition.

    References
    ----------
    J. Demmel, L. Grigori, M. Hoemmen, J. Langou, SIAM J. Sci. Comput. 34 (2012), section 2.
    """
    comm = communicator(group)
    A, _ = agree(A, comm, name)
    top = up_and_down(A, comm, _QR(), name)
    return BlockQR(top.M, top.shared)


@exact_arithmetic()
def tsqr_svd(A: Tensor, group: Group = None, *, vh: Columns = "whole", name: str = "matrix") -> BlockSVD:
    """Exact thin SVD of a matrix in row blocks: QR up a tree, SVD of the last R, products down.

    ``A_p = Q_p R_p``; stacked pairs of R again ``= Q R``, up to one R ``= U_R diag(s) Vh``; then
    ``U_p = Q_p (product of the tree's Q blocks) U_R``.

    Parameters
    ----------
    A
        This process's rows, m_p x n; uneven, empty, or fewer than n. bf16 and fp16 are cast to fp32.
    group
        See :func:`~hpc_oialr.linalg.communicator.communicator`.
    vh
        "whole" gives every process all of Vh, "block" its own columns only: with a wide matrix no
        process then holds more than its share of A and k x k numbers.
    name
        Named in errors.

    Returns
    -------
    BlockSVD
        k = min(m, n).

    Raises
    ------
    NonFiniteError
        On every process, if any block holds NaN or Inf or the SVD does not converge.

    Notes
    -----
    m >= n. Operations per process ``6 m_p n^2 + 20/3 n^3 log2 P``, and ``22 n^3`` on process 0 alone. Sent
    per process, in numbers: ``n^2 / 2`` up (not by process 0), at most ``2 n^2 log2 P`` down.

    m < n: an all-to-all turns row blocks into blocks of columns, ``m_p (n - n_p)`` numbers sent per process;
    then the same on the transpose; "whole" ends with a ring, ``m (n - n_p)`` numbers sent.

    References
    ----------
    J. Demmel et al. as above; the SVD: T. Chan, ACM Trans. Math. Softw. 8 (1982).
    """
    comm = communicator(group)
    A, partition = agree(A, comm, name)
    if partition.m >= partition.n:
        return block_svd(up_and_down(A, comm, _SVD(), name), comm, vh)
    top = up_and_down(transpose_blocks(A, comm, partition), comm, _SVD(), name)
    V, s, Uh, _ = block_svd(top, comm, "whole")
    U = Uh.mT[partition.span(comm.rank)].contiguous()
    return BlockSVD(U, s, gathered(V, comm, partition.n, vh))


@exact_arithmetic()
def gathered_svd(A: Tensor, group: Group = None, *, vh: Columns = "whole", name: str = "matrix") -> BlockSVD:
    """Exact thin SVD: blocks are stacked up the tree, process 0 factorises, rows of U come back.

    Parameters and result as for :func:`tsqr_svd`; also for m < n.

    Notes
    -----
    ``6 max(m, n) k^2 + 20 k^3`` operations and all of A on process 0. Sent per process, in numbers: its
    subtree's rows of A up, at most ``(m k + k n log2 P)`` down.
    """
    comm = communicator(group)
    A, _ = agree(A, comm, name)
    return block_svd(up_and_down(A, comm, _Gather(), name), comm, vh)


def block_svd(top: Top, comm: Communicator, vh: Columns) -> BlockSVD:
    """``M`` is this process's rows of U; ``shared`` is ``s`` and Vh side by side, whole."""
    s, Vh = top.shared[:, 0], top.shared[:, 1:]
    if vh == "block":
        Vh = Vh[:, block_of(Vh.shape[1], comm.size, comm.rank)]
    return BlockSVD(top.M, s.contiguous(), Vh.contiguous(), top.error)


def gathered(V: Tensor, comm: Communicator, n: int, vh: Columns) -> Tensor:
    """``Vh`` from this process's rows of V (n_p x k): its columns, or by a ring all of them."""
    return (V if vh == "block" else comm.all_gather_rows(V, even_blocks(n, comm.size))).mT.contiguous()


class _QR:
    """R goes up."""

    triangular = True

    def split(self, X: Tensor, ledger: Ledger) -> tuple[Apply, Tensor]:
        return blocked_qr(X)

    def finish(self, X: Tensor, ledger: Ledger) -> Top:
        Q, R = blocked_qr(X)
        return Top(Q(torch.eye(R.shape[0], dtype=X.dtype, device=X.device)), R)


class _SVD(_QR):
    """R goes up; ``s`` and ``Vh`` come down side by side."""

    def finish(self, X: Tensor, ledger: Ledger) -> Top:
        Q, R = blocked_qr(X)
        U, s, Vh = svd(R, name="the triangular factor")
        return Top(Q(U), torch.cat([s[:, None], Vh], dim=1))


class _Gather:
    """Nothing is factorised on the way up."""

    triangular = False

    def split(self, X: Tensor, ledger: Ledger) -> tuple[Apply, Tensor]:
        return (lambda M: M), X

    def finish(self, X: Tensor, ledger: Ledger) -> Top:
        U, s, Vh = svd(X, name="the gathered matrix")
        return Top(U, torch.cat([s[:, None], Vh], dim=1))
