"""Figures of a distributed matrix from its blocks: partial sums and one all-reduce."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.communicator import Group
from hpc_oialr.linalg.groups import communicator
from hpc_oialr.linalg.svd import compute_dtype, row_pieces
from hpc_oialr.linalg.tsqr import Columns


@exact_arithmetic()
def basis_stability(
    U1: Tensor, Vh1: Tensor, U2: Tensor, Vh2: Tensor, group: Group = None, *, vh: Columns = "block"
) -> float:
    """Agreement of two bases held in blocks: ``<U1 Vh1, U2 Vh2>_F / sqrt(r1 r2)``; 1 = the same, about 0 = unrelated.

    Computed as ``sum((U1^T U2) o (Vh1 Vh2^T)) / sqrt(r1 r2)`` from partial Gram products; nothing of size m x n is
    built. Signs of singular vectors, which are arbitrary in pairs, do not matter.

    Parameters
    ----------
    U1, U2
        This process's rows, m_p x r1 and m_p x r2.
    Vh1, Vh2
        This process's columns, r1 x n_p and r2 x n_p; with ``vh="whole"`` all n columns on every process.
    group
        See :func:`~hpc_oialr.linalg.communicator.communicator`.

    Notes
    -----
    ``2 r1 r2 (m_p + n_p)`` operations. One all-reduce: of ``2 r1 r2`` numbers for "block", of one number for
    "whole", where the sum over the elements is linear in each process's ``U1^T U2``.

    References
    ----------
    arXiv 2401.08505, section 3 (there r1 = r2 = k and one process).
    """
    comm, (gram_u, gram_v) = communicator(group), _partial_grams(U1, Vh1, U2, Vh2)
    if vh == "block":
        return stability_of(*comm.all_reduce(torch.stack([gram_u, gram_v])))
    total = comm.all_reduce((gram_u * gram_v).sum(dtype=torch.float64))
    return float(total) / math.sqrt(U1.shape[1] * U2.shape[1])


@exact_arithmetic()
def gram_products(
    U1: Tensor, Vh1: Tensor, U2: Tensor, Vh2: Tensor, group: Group = None
) -> tuple[Tensor, Tensor]:
    """``U1^T U2`` and ``Vh1 Vh2^T``, whole on every process; parameters and cost as of :func:`basis_stability`."""
    gram_u, gram_v = communicator(group).all_reduce(torch.stack(_partial_grams(U1, Vh1, U2, Vh2)))
    return gram_u, gram_v


def stability_of(gram_u: Tensor, gram_v: Tensor) -> float:
    """:func:`basis_stability` from its Gram products, ``U1^T U2`` and ``Vh1 Vh2^T``."""
    return float((gram_u * gram_v).sum(dtype=torch.float64)) / math.sqrt(gram_u.shape[0] * gram_u.shape[1])


def _partial_grams(U1: Tensor, Vh1: Tensor, U2: Tensor, Vh2: Tensor) -> list[Tensor]:
    dtype = compute_dtype(U1.dtype)
    U1, Vh1, U2, Vh2 = (part.detach().to(dtype) for part in (U1, Vh1, U2, Vh2))
    return [U1.mT @ U2, Vh1 @ Vh2.mT]


def orthogonality_error(Q: Tensor, group: Group = None) -> float:
    """``||Q^T Q - I||_F / sqrt(r)`` for Q in row blocks (m_p x r).

    ``2 m_p r^2`` operations; one all-reduce of ``r^2`` numbers. For ``Vh`` in blocks of columns pass
    ``Vh.mT``.
    """
    return float(gram_error(Q, group))


@exact_arithmetic()
def gram_error(Q: Tensor, group: Group = None) -> Tensor:
    """:func:`orthogonality_error` as a tensor of shape (), on the device of Q: no synchronisation with a GPU."""
    Q = Q.detach().to(compute_dtype(Q.dtype))
    gram = communicator(group).all_reduce(Q.mT @ Q)
    gram.diagonal().sub_(1)
    error: Tensor = torch.linalg.matrix_norm(gram) / max(1.0, math.sqrt(Q.shape[1]))
    return error


def squared_norm(A: Tensor) -> float:
    """``||A||_F^2`` of one process's block, summed in float64."""
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in row_pieces(A.detach())]
    return float(torch.stack(norms).square().sum())


def frobenius_norm(A: Tensor, group: Group = None) -> float:
    """``||A||_F`` for A in blocks of any shape: one all-reduce of one number."""
    total = torch.tensor(squared_norm(A), dtype=torch.float64, device=A.device)
    return math.sqrt(float(communicator(group).all_reduce(total)))
