"""Thin SVD on one process, with a check of its input and fall-backs where a driver does not converge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hpc_oialr.errors import NonFiniteError
from hpc_oialr.linalg.arithmetic import exact_arithmetic

PIECE_VALUES = 1 << 18


class SVD(NamedTuple):
    """``A = U diag(s) Vh`` with ``U`` (m x k), ``s`` (k, descending), ``Vh`` (k x n), k = min(m, n)."""

    U: Tensor
    s: Tensor
    Vh: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a factorisation runs in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_pieces(A: Tensor) -> Sequence[Tensor]:
    """``A`` in groups of rows that fit the cache, so that what is made of each piece takes little memory.

    On a GPU the whole at once: each piece would be a kernel of its own.
    """
    if A.is_cuda or A.numel() <= PIECE_VALUES or A.dim() == 0:
        return (A,)
    pieces: Sequence[Tensor] = A.split(max(1, PIECE_VALUES * A.shape[0] // A.numel()))
    return pieces


def count_non_finite(A: Tensor) -> int:
    """How many values are NaN or Inf."""
    return sum(int(torch.count_nonzero(~torch.isfinite(piece))) for piece in row_pieces(A))


@exact_arithmetic()
def svd(A: Tensor, *, name: str = "matrix", careful: bool = True) -> SVD:
    """Thin SVD in fp32 (fp64 for fp64 input), with a documented chain of fall-backs.

    On a CPU: LAPACK's gesdd; the same in float64; gesdd of the transpose in float64, whose
    bidiagonalisation takes another path. On a GPU: cuSOLVER's gesvdj, then its gesvd; then the CPU's chain
    in float64. The result has the dtype and device of the first attempt.

    Parameters
    ----------
    A
        Matrix, m x n, any floating dtype.
    name
        Named in the error, usually the layer.
    careful
        Whether to look for NaN and Inf in ``A`` and in the result, which waits for a GPU; otherwise the caller does.

    Raises
    ------
    NonFiniteError
        If ``A`` holds NaN or Inf, or every attempt failed.

    Notes
    -----
    About ``4 m n k + 22 k^3`` floating-point operations (Golub & Van Loan, 4th ed., figure 8.6.1).
    """
    dtype = compute_dtype(A.dtype)
    A = A.detach().to(dtype)
    if careful and (bad := count_non_finite(A)):
        raise NonFiniteError(
            f"{name} holds {bad} NaN or Inf among {A.numel()} values; an SVD needs finite ones. "
            "Lower the learning rate, clip gradients, or resume from an earlier checkpoint."
        )
    for attempt in _attempts(A, on_gpu=A.is_cuda):
        try:
            result = attempt()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if not careful or bool(torch.stack([torch.isfinite(part).all() for part in result]).all()):
            return SVD(*(part.to(A.device, dtype).contiguous() for part in result))
    raise NonFiniteError(
        f"no SVD of {name} ({A.shape[0]} x {A.shape[1]}) converged, neither in {dtype} nor in float64 with "
        "another driver. Check the weight's scale; resume from an earlier checkpoint."
    )


def _attempts(A: Tensor, *, on_gpu: bool) -> Iterator[Callable[[], tuple[Tensor, Tensor, Tensor]]]:
    if on_gpu:
        for driver in ("gesvdj", "gesvd"):
            yield partial(torch.linalg.svd, A, full_matrices=False, driver=driver)
    else:
        yield partial(torch.linalg.svd, A, full_matrices=False)
    wide = A.to("cpu", torch.float64)
    yield partial(torch.linalg.svd, wide, full_matrices=False)
    yield partial(_svd_of_transpose, wide)


def _svd_of_transpose(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    V, s, Uh = torch.linalg.svd(A.mT.contiguous(), full_matrices=False)
    return Uh.mT, s, V.mT
