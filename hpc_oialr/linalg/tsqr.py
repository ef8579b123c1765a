"""QR and exact SVD of a matrix in row blocks, by one pass up a binary tree of ranks and one down.

Every rank factorizes its block, ``A_p = Q_p X_p``, and keeps ``Q_p``; the small factors ``X_p`` are stacked in pairs
and factorized again on their way up. At the root the last stack gives ``M`` and what all ranks are to know; on the way
down each rank multiplies its part of ``M`` by the ``Q`` factors it has kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from hpc_oialr.errors import NonFiniteError
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.communicator import Communicator, Group, children, communicator, parent
from hpc_oialr.linalg.row_partition import agree, block_of, even_blocks, transpose_blocks
from hpc_oialr.linalg.svd import svd

Apply: TypeAlias = Callable[[Tensor], Tensor]
Columns = Literal["whole", "block"]

# A block of four squares loses a quarter of the work to the QR of the stacked R; of 2^18 values it fits the
# second-level cache. Measured on one thread, 65,536 x 512 fp32: 1.8 s instead of 2.9 s for LAPACK on the whole.
BLOCK_SQUARES = 4
BLOCK_VALUES = 1 << 18


class BlockSVD(NamedTuple):
    """``A = U diag(s) Vh`` for A in row blocks; ``s`` and a whole ``Vh`` have the same bits on every rank."""

    U: Tensor  # this rank's rows, m_p x k
    s: Tensor  # k, descending
    Vh: Tensor  # k x n, or this rank's columns, cut by even_blocks(n, P)
    error: float = 0.0  # ||A - U diag(s) Vh||_F from what was cut, without rounding


class BlockQR(NamedTuple):
    """``A = Q R``: this rank's rows of Q (m_p x k), and R (k x n), the same bits on every rank."""

    Q: Tensor
    R: Tensor


@exact_arithmetic()
def tsqr(A: Tensor, group: Group = None, *, name: str = "matrix") -> BlockQR:
    """QR of a matrix in row blocks, backward stable whatever the condition; A and errors as for :func:`tsqr_svd`.

    Operations per rank: ``6 m_p n^2 + 20/3 n^3 log2 P``. Sent per rank, in numbers: at most ``n^2 / 2`` up and
    ``2 n^2 log2 P`` down the tree. J. Demmel et al., SIAM J. Sci. Comput. 34 (2012), section 2.
    """
    comm = communicator(group)
    A, _ = agree(A, comm, name)
    top = up_and_down(A, comm, Scheme(), name)
    return BlockQR(top.M, top.shared)


@exact_arithmetic()
def tsqr_svd(A: Tensor, group: Group = None, *, vh: Columns = "whole", name: str = "matrix") -> BlockSVD:
    """Exact thin SVD of a matrix in row blocks: QR up a tree, SVD of the last R, products down.

    A is this rank's rows, m_p x n: uneven, empty, or fewer than n; bf16 and fp16 are cast to fp32. ``vh="whole"`` gives
    every rank all of Vh, "block" its own columns only: with a wide matrix no rank then has more than its share of A and
    k x k numbers. ``name`` is for errors: :class:`NonFiniteError` is raised on every rank if any block has NaN or Inf or
    the SVD does not converge.

    m >= n: as for :func:`tsqr`, and ``22 n^3`` operations on rank 0 alone. m < n: an all-to-all turns row blocks into
    blocks of columns, ``m_p (n - n_p)`` numbers sent per rank; then the same on the transpose; "whole" ends with a ring,
    ``m (n - n_p)`` numbers sent. T. Chan, ACM Trans. Math. Softw. 8 (1982).
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
    """Exact thin SVD: blocks are stacked up the tree, rank 0 factorizes, rows of U come back.

    Parameters and result as for :func:`tsqr_svd`; also for m < n. ``6 max(m, n) k^2 + 20 k^3`` operations and all of
    A on rank 0. Sent per rank, in numbers: its subtree's rows of A up, at most ``(m k + k n log2 P)`` down.
    """
    comm = communicator(group)
    A, _ = agree(A, comm, name)
    return block_svd(up_and_down(A, comm, _Gather(), name), comm, vh)


def block_svd(top: Top, comm: Communicator, vh: Columns) -> BlockSVD:
    """``M`` is this rank's rows of U; ``shared`` is ``s`` and Vh side by side, whole."""
    s, Vh = top.shared[:, 0], top.shared[:, 1:]
    if vh == "block":
        Vh = Vh[:, block_of(Vh.shape[1], comm.size, comm.rank)]
    return BlockSVD(top.M, s.contiguous(), Vh.contiguous(), top.error)


def gathered(V: Tensor, comm: Communicator, n: int, vh: Columns) -> Tensor:
    """``Vh`` from this rank's rows of V (n_p x k): its columns, or by a ring all of them."""
    return (V if vh == "block" else comm.all_gather_rows(V, even_blocks(n, comm.size))).mT.contiguous()


# -- the tree --------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """Of a subtree: squared norms of its rows of A and of what was cut from them, and whether an SVD failed."""

    energy: float = 0.0
    cut: float = 0.0
    failed: bool = False


class Top(NamedTuple):
    """Result at the root: ``M`` (h x k) goes down by parts, ``shared`` (k x c) whole; Frobenius error."""

    M: Tensor
    shared: Tensor
    error: float = 0.0


class Scheme:
    """What is factorized on the way up and at the root; here QR."""

    # X is upper triangular, so that half of it need not be sent.
    triangular = True

    def split(self, X: Tensor, ledger: Ledger) -> tuple[Apply, Tensor]:
        """``X = Q X'``: the product with Q, and X'. Notes in the ledger what it cuts."""
        return blocked_qr(X)

    def finish(self, X: Tensor, ledger: Ledger) -> Top:
        """The last step, at the root."""
        Q, R = blocked_qr(X)
        return Top(Q(torch.eye(R.shape[0], dtype=X.dtype, device=X.device)), R)


class _SVD(Scheme):
    """R goes up; ``s`` and ``Vh`` come down side by side."""

    def finish(self, X: Tensor, ledger: Ledger) -> Top:
        Q, R = blocked_qr(X)
        # Far below rounding; but where columns shrink a lot, products of such values are subnormal, and an SVD took
        # 41 s instead of 11 (4,096 columns, each 1 % smaller than the one before, fp32).
        if R.numel():
            R = R.masked_fill(R.abs() < torch.finfo(R.dtype).eps ** 2 * R.abs().max(), 0)
        U, s, Vh = svd(R, name="the triangular factor")
        return Top(Q(U), torch.cat([s[:, None], Vh], dim=1))


class _Gather(Scheme):
    """Nothing is factorized on the way up."""

    triangular = False

    def split(self, X: Tensor, ledger: Ledger) -> tuple[Apply, Tensor]:
        return (lambda M: M), X

    def finish(self, X: Tensor, ledger: Ledger) -> Top:
        U, s, Vh = svd(X, name="the gathered matrix")
        return Top(U, torch.cat([s[:, None], Vh], dim=1))


def up_and_down(A: Tensor, comm: Communicator, scheme: Scheme, name: str, *, energy: float = 0.0) -> Top:
    """Run a scheme over all ranks; gives this rank's rows of ``M``, and the same bits of ``shared`` everywhere.

    ``energy`` is ``||A_p||_F^2``, for schemes that cut. Sent per rank: ``X`` once (not by rank 0), then to each of at
    most ceil(log2 P) ranks below it their rows of ``M`` and ``shared``; 56 bytes of headers a pair. Raises
    :class:`NonFiniteError` on every rank if a factorization failed on any.
    """
    X, ledger = A, Ledger(energy)

    def split() -> tuple[Apply, Tensor]:
        try:
            return scheme.split(X, ledger)
        except NonFiniteError:
            # The failure goes up and down the tree, so that no rank waits for a message that never comes.
            ledger.failed = True
            return (lambda M: M), X[:0]

    kept: list[tuple[Apply, int]] = []
    below = children(comm.rank, comm.size)
    for child in below:
        Q, X = split()
        kept.append((Q, X.shape[0]))
        X = torch.cat([X, _receive_factor(comm, child, X, scheme, ledger)])
    top: Top | None = None
    if comm.rank == 0:
        with contextlib.suppress(NonFiniteError):
            top = None if ledger.failed else scheme.finish(X, ledger)
    else:
        Q, X = split()
        _send_factor(comm, X, scheme, ledger)
        if (top := _receive_top(comm, X)) is not None:
            top = top._replace(M=Q(top.M))
    for child, (Q, height) in zip(reversed(below), reversed(kept), strict=True):
        _send_top(comm, child, top, height, X.device)
        if top is not None:
            top = top._replace(M=Q(top.M[:height]))
    if top is None:
        raise NonFiniteError(
            f"no factorization of {name} converged on one of {comm.size} ranks, neither in its own precision "
            "nor in float64. Check its scale; resume from an earlier checkpoint."
        )
    return top


def _send_factor(comm: Communicator, X: Tensor, scheme: Scheme, ledger: Ledger) -> None:
    header = [X.shape[0], ledger.energy, ledger.cut, ledger.failed]
    comm.send(torch.tensor(header, dtype=torch.float64, device=X.device), parent(comm.rank))
    comm.send(X[_upper(X)] if scheme.triangular else X, parent(comm.rank))


def _receive_factor(comm: Communicator, child: int, like: Tensor, scheme: Scheme, ledger: Ledger) -> Tensor:
    header = comm.receive(torch.empty(4, dtype=torch.float64, device=like.device), child)
    height, energy, cut, failed = header.tolist()
    ledger.energy += energy
    ledger.cut += cut
    ledger.failed |= bool(failed)
    X = like.new_zeros(int(height), like.shape[1])
    if not scheme.triangular:
        return comm.receive(X, child)
    upper = _upper(X)
    X[upper] = comm.receive(like.new_empty(int(upper.sum())), child)
    return X


def _upper(X: Tensor) -> Tensor:
    return torch.ones(X.shape, dtype=torch.bool, device=X.device).triu_()


def _send_top(comm: Communicator, child: int, top: Top | None, height: int, device: torch.device) -> None:
    """The rows of ``M`` below ``height``, and ``shared``; or that there are none."""
    header = [-1.0, 0.0, 0.0] if top is None else [top.shared.shape[0], top.error, top.shared.shape[1]]
    comm.send(torch.tensor(header, dtype=torch.float64, device=device), child)
    if top is not None:
        comm.send(top.M[height:], child)
        comm.send(top.shared, child)


def _receive_top(comm: Communicator, X: Tensor) -> Top | None:
    header = torch.empty(3, dtype=torch.float64, device=X.device)
    k, error, columns = comm.receive(header, parent(comm.rank)).tolist()
    if k < 0:
        return None
    M = comm.receive(X.new_empty(X.shape[0], int(k)), parent(comm.rank))
    shared = comm.receive(X.new_empty(int(k), int(columns)), parent(comm.rank))
    return Top(M, shared, error)


def blocked_qr(A: Tensor) -> tuple[Apply, Tensor]:
    """``A = Q R`` in float32 or float64: the product ``M -> Q M``, with Q left in factors, and R (min(m, n) x n).

    A tall matrix on a CPU is cut into blocks that fit the cache, their R factors stacked and factorized in turn (a
    flat tree, J. Demmel et al., SIAM J. Sci. Comput. 34, 2012, section 3): backward stable like Householder QR, with
    ``4 m n^2`` operations times 4/3. On a GPU one call does it all.
    """
    m, n = A.shape
    rows = max(BLOCK_SQUARES * n, BLOCK_VALUES // max(n, 1))
    if m < 2 * rows or n == 0 or A.device.type != "cpu":
        Q, R = torch.linalg.qr(A)
        return (lambda M: Q @ M), R
    blocks = [torch.linalg.qr(block) for block in A.tensor_split(m // rows)]
    top, R = blocked_qr(torch.cat([block.R for block in blocks]))
    Qs = [block.Q for block in blocks]

    def apply(M: Tensor) -> Tensor:
        out = M.new_empty(m, M.shape[1])
        pieces, places = top(M).split(n), out.split([len(Q) for Q in Qs])
        for Q, piece, place in zip(Qs, pieces, places, strict=True):
            torch.mm(Q, piece, out=place)
        return out

    return apply, R
