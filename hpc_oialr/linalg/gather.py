"""The SVD of a matrix in row blocks on one process: for small or nearly square ones."""

from __future__ import annotations

import torch
from torch import Tensor

from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.communicator import Group
from hpc_oialr.linalg.groups import communicator
from hpc_oialr.linalg.local_qr import Apply
from hpc_oialr.linalg.row_partition import agree
from hpc_oialr.linalg.svd import svd
from hpc_oialr.linalg.tree import Ledger, Top, up_and_down
from hpc_oialr.linalg.tsqr import BlockSVD, Columns, my_columns


@exact_arithmetic()
def gathered_svd(A: Tensor, group: Group = None, *, vh: Columns = "whole", name: str = "matrix") -> BlockSVD:
    """Exact thin SVD: blocks are stacked up the tree, process 0 factorises, rows of U come back.

    Parameters and result as for :func:`~hpc_oialr.linalg.tsqr.tsqr_svd`; also for m < n.

    Notes
    -----
    ``6 max(m, n) k^2 + 20 k^3`` operations and all of A on process 0. Sent per process, in numbers: its
    subtree's rows of A up, at most ``(m k + k n log2 P)`` down.
    """
    comm = communicator(group)
    A, _ = agree(A, comm, name)
    M, shared, _ = up_and_down(A, comm, _Stack(), name)
    Vh = shared[:, 1:].contiguous()
    return BlockSVD(M, shared[:, 0].contiguous(), Vh if vh == "whole" else my_columns(Vh, comm))


class _Stack:
    """Nothing is factorised on the way up."""

    triangular = False

    def split(self, X: Tensor, ledger: Ledger) -> tuple[Apply, Tensor]:
        return (lambda M: M), X

    def finish(self, X: Tensor, ledger: Ledger) -> Top:
        U, s, Vh = svd(X, name="the gathered matrix")
        return Top(U, torch.cat([s[:, None], Vh], dim=1))
