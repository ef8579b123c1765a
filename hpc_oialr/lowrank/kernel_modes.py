"""Kernels of convolutions in Tucker-2 form as matrices: ``W = U S (Vh x I)``, with I for the places in the kernel.

The weight is out x (in K) after flattening, K the places of a kernel, ``U`` is out x r_out, ``Vh`` r_in x in, and the
core ``S`` r_out x (r_in K). With K = 1 it is ``U S Vh``: what is said here holds for matrices too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

from hpc_oialr.linalg.tensors import mode_product, unfold

# r of a layer; of a Tucker layer that of the output and of the input channels.
Inner: TypeAlias = int | tuple[int, int]


def times(A: Tensor, B: Tensor) -> Tensor:
    """``A (B x I)``: A is m x (b K) and B is b x c, the result m x (c K); K = 1 is the product of matrices."""
    m, b = len(A), len(B)
    if A.shape[1] == b:
        return A @ B
    return mode_product(A.reshape(m, b, A.shape[1] // b), B.mT, 1).flatten(1)


def channel_unfoldings(W: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The unfoldings of a kernel (out x channels K) by its output and by its input channels."""
    T = W.reshape(len(W), channels, -1)
    return unfold(T, 0), unfold(T, 1)


def factor_shapes(dense_shape: Sequence[int], r: Inner) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Shapes of ``U``, ``S`` and ``Vh`` of a weight of this shape."""
    m, n = dense_shape[0], math.prod(dense_shape[1:])
    if isinstance(r, int):
        return (m, r), (r, r), (r, n)
    (r_out, r_in), channels = r, dense_shape[1]
    return (m, r_out), (r_out, r_in * (n // channels)), (r_in, channels)


def as_inner(stored: Any) -> Inner:
    """From a checkpoint's JSON, which holds a pair as a list."""
    if isinstance(stored, (list, tuple)):
        r_out, r_in = stored
        return int(r_out), int(r_in)
    return int(stored)


def is_tucker(S: Tensor, Vh: Tensor) -> bool:
    """Whether factors of these shapes are those of a Tucker layer."""
    return bool(S.shape[1] != Vh.shape[0])


def leading_channels(W: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U``, ``S`` and ``Vh`` of a kernel (out x (in K)) projected onto bases of its output and input channels.

    ``S = U^T W (V x I)``, with U out x r_out and V in x r_in of orthonormal columns.
    """
    return U, U.mT @ times(W.to(U.dtype), V), V.mT
