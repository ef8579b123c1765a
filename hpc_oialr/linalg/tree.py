"""One pass up a binary tree of processes and one down: what TSQR and the hierarchical SVD share.

Every process factorises its block, ``A_p = Q_p X_p``, and keeps ``Q_p``; the small factors ``X_p`` are
stacked in pairs and factorised again on their way up. At the top the last stack gives ``M`` and what all
are to know; on the way down each process multiplies its part of ``M`` by the ``Q`` factors it has kept.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hpc_oialr.errors import NonFiniteError
from hpc_oialr.linalg.communicator import Communicator, children, parent
from hpc_oialr.linalg.local_qr import Apply


@dataclass
class Ledger:
    """Squared Frobenius norms of a subtree: of its rows of A, and of what has been cut from them."""

    energy: float = 0.0
    cut: float = 0.0
    failed: bool = field(default=False)

    def absorb(self, other: Ledger) -> None:
        """Add another subtree's."""
        self.energy += other.energy
        self.cut += other.cut
        self.failed = self.failed or other.failed


class Top(NamedTuple):
    """Result at the root: ``M`` (h x k) goes down by parts, ``shared`` (k x c) whole; Frobenius error."""

    M: Tensor
    shared: Tensor
    error: float = 0.0


class Scheme(Protocol):
    """How to factorise.

    Attributes
    ----------
    triangular
        Whether ``X`` is upper triangular, so that half of it need not be sent.
    """

    triangular: bool

    def split(self, X: Tensor, ledger: Ledger) -> tuple[Apply, Tensor]:
        """``X = Q X'``: the product with Q, and X'. Notes in the ledger what it cuts."""
        ...

    def finish(self, X: Tensor, ledger: Ledger) -> Top:
        """The last step, at the root."""
        ...


def up_and_down(A: Tensor, comm: Communicator, scheme: Scheme, name: str, *, energy: float = 0.0) -> Top:
    """Run a scheme over all processes.

    Parameters
    ----------
    A
        This process's rows, m_p x n, finite.
    energy
        ``||A_p||_F^2``, for schemes that cut.

    Returns
    -------
    Top
        With this process's rows of ``M``, m_p x k, and the same bits of ``shared`` everywhere.

    Raises
    ------
    NonFiniteError
        On every process, if a factorisation failed on any.

    Notes
    -----
    Bytes sent per process: ``X`` once (not by process 0), then for each process below it that reports
    to it, at most ceil(log2 P), its rows of ``M`` and ``shared``; 56 bytes of headers a pair.
    """
    X, ledger = A, Ledger(energy)
    kept: list[tuple[Apply, int]] = []
    below = children(comm.rank, comm.size)
    for child in below:
        Q, X = _guarded(scheme, X, ledger)
        kept.append((Q, X.shape[0]))
        X = torch.cat([X, _receive_factor(comm, child, X, scheme, ledger)])
    top: Top | None = None
    if comm.rank == 0:
        with contextlib.suppress(NonFiniteError):
            top = None if ledger.failed else scheme.finish(X, ledger)
        M = None if top is None else top.M
    else:
        Q, X = _guarded(scheme, X, ledger)
        _send_factor(comm, X, scheme, ledger)
        top = _receive_top(comm, X)
        M = None if top is None else Q(top.M)
    for child, (Q, height) in zip(reversed(below), reversed(kept), strict=True):
        _send_top(comm, child, top, None if M is None else M[height:], like=X)
        M = None if M is None else Q(M[:height])
    if top is None or M is None:
        raise NonFiniteError(
            f"no factorisation of {name} converged on one of {comm.size} processes, neither in its own precision "
            "nor in float64. Check its scale; resume from an earlier checkpoint."
        )
    return Top(M, top.shared, top.error)


def _guarded(scheme: Scheme, X: Tensor, ledger: Ledger) -> tuple[Apply, Tensor]:
    """A failure is noted and travels up, so that nobody waits for a message that never comes."""
    try:
        return scheme.split(X, ledger)
    except NonFiniteError:
        ledger.failed = True
        return (lambda M: M), X[:0]


# -- messages --------------------------------------------------------------------------------------


def _send_factor(comm: Communicator, X: Tensor, scheme: Scheme, ledger: Ledger) -> None:
    header = [X.shape[0], ledger.energy, ledger.cut, ledger.failed]
    comm.send(torch.tensor(header, dtype=torch.float64, device=X.device), parent(comm.rank))
    comm.send(X[_upper(X)] if scheme.triangular else X, parent(comm.rank))


def _receive_factor(comm: Communicator, child: int, like: Tensor, scheme: Scheme, ledger: Ledger) -> Tensor:
    header = comm.receive(torch.empty(4, dtype=torch.float64, device=like.device), child).tolist()
    ledger.absorb(Ledger(header[1], header[2], bool(header[3])))
    X = like.new_zeros(int(header[0]), like.shape[1])
    if not scheme.triangular:
        return comm.receive(X, child)
    upper = _upper(X)
    X[upper] = comm.receive(like.new_empty(int(upper.sum())), child)
    return X


def _upper(X: Tensor) -> Tensor:
    return torch.ones(X.shape, dtype=torch.bool, device=X.device).triu_()


def _send_top(comm: Communicator, child: int, top: Top | None, M: Tensor | None, *, like: Tensor) -> None:
    header = [-1.0, 0.0, 0.0] if top is None else [top.shared.shape[0], top.error, top.shared.shape[1]]
    comm.send(torch.tensor(header, dtype=torch.float64, device=like.device), child)
    if top is not None and M is not None:
        comm.send(M, child)
        comm.send(top.shared, child)


def _receive_top(comm: Communicator, X: Tensor) -> Top | None:
    header = torch.empty(3, dtype=torch.float64, device=X.device)
    k, error, columns = comm.receive(header, parent(comm.rank)).tolist()
    if k < 0:
        return None
    M = comm.receive(X.new_empty(X.shape[0], int(k)), parent(comm.rank))
    shared = comm.receive(X.new_empty(int(k), int(columns)), parent(comm.rank))
    return Top(M, shared, error)
