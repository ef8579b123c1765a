"""Truncated multilinear SVD of a tensor, and HOOI, which improves it.

Source: L. De Lathauwer, B. De Moor and J. Vandewalle, SIAM J. Matrix Anal. Appl. 21, 2000: A multilinear singular value
decomposition, p. 1253; On the best rank-1 and rank-(R1, ..., RN) approximation of higher-order tensors, p. 1324.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hpc_oialr.errors import ConfigError, NonFiniteError, check_interval
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.communicator import Communicator, Group, children, communicator, parent
from hpc_oialr.linalg.noise_spectra import MultilinearNoiseEdge, unfolded_shapes
from hpc_oialr.linalg.row_partition import agree, transpose_blocks
from hpc_oialr.linalg.svd import SVD, compute_dtype, count_non_finite, svd

Ranks = Sequence[int] | MultilinearNoiseEdge


class Tucker(NamedTuple):
    """A tensor of sizes n_1 ... n_N as a core of sizes r_1 ... r_N, multiplied in each mode by an orthonormal basis."""

    core: Tensor
    bases: tuple[Tensor, ...]  # n_l x r_l
    spectra: tuple[Tensor, ...]  # all singular values of each unfolding of the tensor that was decomposed
    sweeps: int = 0  # of HOOI

    def dense(self) -> Tensor:
        """The n_1 x ... x n_N tensor."""
        T = self.core
        for mode, U in enumerate(self.bases):
            T = mode_product(T, U, mode)
        return T


def unfold(T: Tensor, mode: int) -> Tensor:
    """The n_l x (product of the others) matrix of a mode's fibres, the other modes in their order."""
    rows = T.movedim(mode, 0)
    return rows.reshape(len(rows), math.prod(rows.shape[1:]))


def mode_product(T: Tensor, M: Tensor, mode: int) -> Tensor:
    """``T`` with its mode of size n replaced by one of size m, through the m x n matrix ``M``."""
    before, after = math.prod(T.shape[:mode]), math.prod(T.shape[mode + 1 :])
    shape = (*T.shape[:mode], len(M), *T.shape[mode + 1 :])
    if after == 1:
        return (T.reshape(before, T.shape[mode]) @ M.mT).reshape(shape)
    # A view, not a copy of the unfolding: T may be the whole tensor.
    return (M @ T.reshape(before, T.shape[mode], after)).reshape(shape)


@exact_arithmetic()
def mlsvd(T: Tensor, r: Ranks | None = None, *, group: Group = None, name: str = "tensor") -> Tucker:
    """Multilinear SVD (HOSVD), truncated: the leading left singular vectors of every unfolding, and the core by them.

    Of an n_l x p unfolding with p > n_l only the triangle of a QR is decomposed, which has the same values and vectors;
    about ``2 n_l^2 p`` operations a mode. In fp32, or in fp64 for an fp64 tensor.

    Parameters
    ----------
    T
        At least two modes.
    r
        Size of the core in each mode; a :class:`~hpc_oialr.MultilinearNoiseEdge` chooses it, also 0 where there is only
        noise. Default: as many as there are singular values, and then ``dense()`` is ``T``.
    group
        Of ranks that hold ``T`` in blocks along its first mode, this one ``T[a:b]``, which may be empty. The result is
        that of one process, whole on every rank; see :func:`_of_blocks`.
    name
        For errors.

    Raises
    ------
    ConfigError
        If a size in ``r`` does not fit ``T``.
    NonFiniteError
        If ``T`` holds NaN or Inf.
    """
    comm = communicator(group)
    if comm.size > 1:
        return _of_blocks(T, r, comm, name)
    T = _checked(T, r, name)
    found = [_left_svd(T, mode, name) for mode in range(T.dim())]
    spectra = tuple(each.s for each in found)
    sizes = _chosen(r, spectra, T.shape)
    bases = tuple(each.U[:, :size].contiguous() for each, size in zip(found, sizes, strict=True))
    return Tucker(_projected(T, bases), bases, spectra)


@exact_arithmetic()
def hooi(
    T: Tensor, r: Ranks, *, start: Tucker | None = None, sweeps: int = 50, tolerance: float = 1e-6, name: str = "tensor"
) -> Tucker:
    """Higher-order orthogonal iteration from the truncated MLSVD, towards the best approximation with a core of sizes r.

    A sweep sets every basis, one mode after another, to the leading left singular vectors of the tensor projected onto
    the other bases. The core's norm never falls; the iteration ends when a sweep adds at most ``tolerance`` of its
    square, or after ``sweeps``. A sweep multiplies the whole tensor by a basis twice, whatever the number of modes.

    Parameters
    ----------
    T, r, name
        As for :func:`mlsvd`; no size in ``r`` may exceed the product of the others.
    start
        An earlier result for ``T``, whose core is at least as large: its leading vectors are the start, not the MLSVD's.
    sweeps, tolerance
        At most so many, at least one; with a tolerance of 0 all of them, unless the norm stands still.

    Raises
    ------
    ConfigError, NonFiniteError
        As :func:`mlsvd`, and if ``sweeps``, ``tolerance`` or ``start`` cannot be used.
    """
    if sweeps < 1:
        raise ConfigError("sweeps", sweeps, "must be at least 1", fix="mlsvd is the result of none.")
    check_interval("tolerance", tolerance, 0, 1, closed=(True, False))
    T = _checked(T, r, name)
    if not isinstance(r, MultilinearNoiseEdge):
        for mode, (size, others) in enumerate(unfolded_shapes(r)):
            if size > others:
                rule = f"must be at most the product of the others, {others}"
                raise ConfigError(f"r[{mode}]", size, rule, fix="The projected tensor has no more directions.")
    if start is not None and tuple(len(U) for U in start.bases) != T.shape:
        raise ConfigError("start", tuple(len(U) for U in start.bases), f"must be of shape {tuple(T.shape)}")
    start = start or mlsvd(T, r, name=name)
    sizes = _chosen(r, start.spectra, T.shape)
    if any(has < size for has, size in zip(start.core.shape, sizes, strict=True)):
        raise ConfigError("start.core", tuple(start.core.shape), f"must be at least {sizes}")
    bases = [U[:, :size] for U, size in zip(start.bases, sizes, strict=True)]
    if 0 in sizes:
        return Tucker(_projected(T, bases), tuple(bases), start.spectra)
    energy, done = _energy(start.core[tuple(slice(size) for size in sizes)]), 0
    while done < sweeps:
        core = _sweep(T, bases, name)
        before, energy, done = energy, _energy(core), done + 1
        if energy - before <= tolerance * energy:
            break
    return Tucker(core, tuple(bases), start.spectra, done)


def _sweep(T: Tensor, bases: list[Tensor], name: str) -> Tensor:
    """Replace every basis, and return the core."""
    # Products with the bases behind a mode, which are still the old ones when its turn comes: computed once.
    behind = [T]
    for mode in reversed(range(1, T.dim())):
        behind.append(mode_product(behind[-1], bases[mode].mT, mode))
    for mode, U in enumerate(bases):
        Y = _projected(behind.pop(), bases[:mode])
        bases[mode] = _left_svd(Y, mode, name).U[:, : U.shape[1]].contiguous()
    return mode_product(Y, bases[-1].mT, T.dim() - 1)


def _energy(T: Tensor) -> float:
    return float(T.double().square().sum())


def _projected(T: Tensor, bases: Sequence[Tensor]) -> Tensor:
    for mode, U in enumerate(bases):
        T = mode_product(T, U.mT, mode)
    return T


def _left_svd(T: Tensor, mode: int, name: str) -> SVD:
    """SVD of an unfolding; ``Vh`` is the triangle's where the unfolding is wide."""
    A = unfold(T, mode)
    if A.shape[1] > A.shape[0]:
        A = torch.linalg.qr(A.mT, mode="r").R.mT
    return svd(A, name=f"{name}, mode {mode}")


def _of_blocks(T: Tensor, r: Ranks | None, comm: Communicator, name: str) -> Tucker:
    """:func:`mlsvd` of a tensor in blocks along its first mode; a collective call.

    Of each mode's unfolding, transposed and in row blocks, all ranks make the triangle of a QR: one all-reduce of
    ``n_l^2 / 2`` numbers, with a QR of two triangles in place of a sum (a Gram matrix would lose the small half of the
    digits). For the first mode one all-to-all before turns the blocks, in which a rank sends what it holds but its own
    share. The core's projection is summed by one all-reduce of the core.
    """
    if T.dim() < 2:
        raise ConfigError(name, tuple(T.shape), "must have at least two modes")
    flat, rows = agree(T.reshape(len(T), math.prod(T.shape[1:])), comm, name)
    T, shape = flat.reshape(T.shape), (rows.m, *T.shape[1:])
    _check_sizes(r, shape, name)
    vectors, spectra = [], []
    for mode, (n, others) in enumerate(unfolded_shapes(shape)):
        block = unfold(T, mode).mT if mode else transpose_blocks(flat, comm, rows)
        U, s, _ = svd(_triangle(block, comm).mT, name=f"{name}, mode {mode}")
        k = min(n, others)
        # Rank 0's: another processor may round otherwise, and r must not differ.
        vectors.append(comm.broadcast(U[:, :k].contiguous()))
        spectra.append(comm.broadcast(s[:k].clone()))
    sizes = _chosen(r, spectra, shape)
    bases = tuple(U[:, :size].contiguous() for U, size in zip(vectors, sizes, strict=True))
    own = bases[0][rows.span(comm.rank)]
    return Tucker(comm.all_reduce(_projected(T, (own, *bases[1:]))), bases, tuple(spectra))


def _triangle(A: Tensor, comm: Communicator) -> Tensor:
    """R (n x n) of the QR of a matrix in row blocks (m_p x n), the same on every rank; zeros are not sent."""
    n = A.shape[1]
    i, j = torch.triu_indices(n, n, device=A.device)
    R = A.new_zeros(n, n)
    own = torch.linalg.qr(A, mode="r").R
    R[: len(own)] = own
    for child in children(comm.rank, comm.size):
        other = A.new_zeros(n, n)
        other[i, j] = comm.receive(A.new_empty(len(i)), child)
        R = torch.linalg.qr(torch.cat([R, other]), mode="r").R
    upper = R[i, j]
    if comm.rank:
        comm.send(upper, parent(comm.rank))
    R = A.new_zeros(n, n)
    R[i, j] = comm.broadcast(upper)
    return R


def _checked(T: Tensor, r: Ranks | None, name: str) -> Tensor:
    _check_sizes(r, T.shape, name)
    T = T.detach().to(compute_dtype(T.dtype))
    if bad := count_non_finite(T):
        raise NonFiniteError(f"{name} holds {bad} NaN or Inf among {T.numel()} values; an SVD needs finite ones.")
    return T


def _check_sizes(r: Ranks | None, shape: Sequence[int], name: str) -> None:
    if len(shape) < 2 or math.prod(shape) == 0:
        raise ConfigError(name, tuple(shape), "must have at least two modes, none of size 0")
    if isinstance(r, Sequence):
        largest = _largest(shape)
        if len(r) != len(shape) or not all(0 <= size <= most for size, most in zip(r, largest, strict=True)):
            raise ConfigError("r", tuple(r), f"must be a size for each mode, at most {largest}")


def _chosen(r: Ranks | None, spectra: Sequence[Tensor], shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(r, MultilinearNoiseEdge):
        return r.choose(spectra, shape)
    return _largest(shape) if r is None else tuple(r)


def _largest(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(min(sides) for sides in unfolded_shapes(shape))
