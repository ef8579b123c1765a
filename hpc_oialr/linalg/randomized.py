"""Randomized SVD of a matrix in row blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpc_oialr.errors import ConfigError
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.blocks import frobenius_norm, squared_norm
from hpc_oialr.linalg.communicator import Communicator, Group
from hpc_oialr.linalg.groups import communicator
from hpc_oialr.linalg.row_partition import agree, even_blocks
from hpc_oialr.linalg.tsqr import BlockSVD, Columns, gathered, tsqr, tsqr_svd


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
    ``Q^T A`` (l x n). Every ``orth`` is a TSQR. Every process draws the same G
    from the seed; it is not sent.

    Parameters
    ----------
    A
        This process's rows, m_p x n.
    group
        See :func:`~hpc_oialr.linalg.communicator.communicator`.
    r
        Triplets, >= 1 (fewer if k < r).
    oversampling
        Columns of the sketch beyond r.
    power_iterations
        q; 2 is enough for spectra that fall slowly, 0 for ones that fall fast.
    seed
        Of the sketch.
    vh, name
        As for :func:`~hpc_oialr.linalg.tsqr.tsqr_svd`.

    Returns
    -------
    BlockSVD
        ``error`` is ``sqrt(||A||_F^2 - sum(s^2))``, the true error to within ``sqrt(epsilon) ||A||_F``, since
        ``U diag(s) Vh`` is an orthogonal projection of A.

    Raises
    ------
    ConfigError
        If a number is out of range.
    NonFiniteError
        On every process, as for TSQR.

    Notes
    -----
    Operations per process ``4 m_p n l (q + 1)`` and TSQRs of m_p x l and n_p x l. Sent per process, in numbers:
    ``(2 q + 1) n l`` at most, and the messages of ``2 q + 2`` TSQRs of width l.

    References
    ----------
    N. Halko, P.-G. Martinsson, J. Tropp, SIAM Rev. 53 (2011), algorithms 4.4 and 5.1, theorem 10.5.
    """
    check_sketch(r, oversampling, power_iterations)
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
    """Independent standard normal numbers, n x width (float32), the same bits on every process.

    From the CPU's generator: a GPU's draws other numbers.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(n, width, generator=generator, device="cpu", dtype=torch.float32)


def _transposed_product(A: Tensor, Q: Tensor, comm: Communicator) -> Tensor:
    """This process's rows of ``A^T Q`` (n_p x l), summed over the row blocks of A and Q."""
    product = A.mT @ Q
    return comm.reduce_scatter(product.split(even_blocks(A.shape[1], comm.size)))


def check_sketch(r: int, oversampling: int, power_iterations: int) -> None:
    """Raise :class:`ConfigError` unless all three are in range."""
    for name, value, low in (
        ("r", r, 1),
        ("oversampling", oversampling, 0),
        ("power_iterations", power_iterations, 0),
    ):
        if value < low:
            raise ConfigError(name, value, f"must be at least {low}")
