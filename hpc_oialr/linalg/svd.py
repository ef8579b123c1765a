"""Thin SVDs on one process: input check, fall-backs where a driver does not converge, batches on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hpc_oialr.errors import NonFiniteError
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.gram_svd import FORMS, Form, gram_svd

PIECE_VALUES = 1 << 18
# Of gram_svd, for each number of a matrix: about twelve float64 matrices at once.
GRAM_BYTES = 96
UNKNOWN_ROOM = 1 << 62
# ||Q^T Q - I||_F / sqrt(k) of gesvdj's bases; LAPACK's in fp32 are below 2e-6.
LARGEST_ERROR = 1e-5


class SVD(NamedTuple):
    """``A = U diag(s) Vh`` with ``U`` (m x k), ``s`` (k, descending), ``Vh`` (k x n), k = min(m, n)."""

    U: Tensor
    s: Tensor
    Vh: Tensor

    def leading(self, r: int) -> SVD:
        """The largest ``r`` values and their vectors."""
        return SVD(self.U[:, :r], self.s[:r], self.Vh[:r])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype a factorization runs in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_pieces(A: Tensor) -> Sequence[Tensor]:
    """``A`` in groups of rows that fit the cache, so that temporaries of each piece are small; whole on a GPU."""
    if A.is_cuda or A.numel() <= PIECE_VALUES or A.dim() == 0:
        return (A,)
    pieces: Sequence[Tensor] = A.split(max(1, PIECE_VALUES * A.shape[0] // A.numel()))
    return pieces


def count_non_finite(A: Tensor) -> int:
    """How many values are NaN or Inf."""
    return sum(int(torch.count_nonzero(~torch.isfinite(piece))) for piece in row_pieces(A))


@exact_arithmetic()
def svd(A: Tensor, *, name: str = "matrix", careful: bool = True) -> SVD:
    """Thin SVD of an m x n matrix of any floating dtype in fp32 (fp64 for fp64 input), with fall-backs.

    On a CPU: LAPACK's gesdd; the same in float64; gesdd of the transpose in float64, whose bidiagonalization takes
    another path. On a GPU: :func:`~hpc_oialr.linalg.gram_svd.gram_svd` for fp32; cuSOLVER's gesvdj, whose result is
    checked, then gesvd; then the CPU's chain in float64. The result has the dtype and device of the first attempt. About
    ``4 m n k + 22 k^3`` operations (Golub & Van Loan, 4th ed., fig. 8.6.1).

    ``name``, usually the layer's, is for errors. If ``careful``, ``A`` and the result are searched for NaN and Inf,
    which waits for a GPU; otherwise the caller does that. Raises :class:`NonFiniteError` if there are any, or every
    attempt failed.
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
        if not careful or _all_finite(result):
            return SVD(*(part.to(A.device, dtype).contiguous() for part in result))
    raise NonFiniteError(
        f"no SVD of {name} ({A.shape[0]} x {A.shape[1]}) converged, neither in {dtype} nor in float64 with "
        "another driver. Check the weight's scale; resume from an earlier checkpoint."
    )


def svds(matrices: Sequence[Tensor], names: Sequence[str], *, careful: bool = True) -> list[SVD]:
    """:func:`svd` of matrices of one shape: one batch on a GPU, a loop elsewhere and for those that fail in it."""
    found: list[SVD | None] = [None] * len(matrices)
    fp32 = compute_dtype(matrices[0].dtype) == torch.float32
    for form in FORMS if matrices[0].is_cuda and fp32 else ():
        left = [i for i, done in enumerate(found) if done is None]
        if len(left) < 2:
            break
        with suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            U, s, Vh = gram_svd(torch.stack([matrices[i].detach().float() for i in left]), form=form)
            right = torch.isfinite(s).all(-1).tolist() if careful else [True] * len(left)
            for i, *parts, ok in zip(left, U, s, Vh, right, strict=True):
                found[i] = SVD(*parts) if ok else None
    return [done or svd(A, name=name, careful=careful) for done, A, name in zip(found, matrices, names, strict=True)]


def bytes_below_peak(device: torch.device) -> int:
    """How much more of a GPU's memory may be in use without a new peak; :data:`UNKNOWN_ROOM` before a step shows it."""
    held, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    # Without a step since the peak was last set back it tells nothing.
    return UNKNOWN_ROOM if peak <= 1.02 * held else peak - held


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    return bool(torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all())


def _attempts(A: Tensor, *, on_gpu: bool) -> Iterator[Callable[[], Sequence[Tensor]]]:
    if on_gpu and A.dtype == torch.float32 and GRAM_BYTES * A.numel() <= bytes_below_peak(A.device):
        for form in FORMS:
            yield partial(_by_gram_matrix, A, form)
    if on_gpu:
        yield partial(_by_gesvdj, A)
    yield partial(torch.linalg.svd, A, full_matrices=False, driver="gesvd" if on_gpu else None)
    B = A.to("cpu", torch.float64)
    yield partial(torch.linalg.svd, B, full_matrices=False)
    yield partial(_svd_of_transpose, B)


def _by_gesvdj(A: Tensor) -> Sequence[Tensor]:
    """By Jacobi rotations; LinAlgError where they end too early: bases of 1,024 columns had errors of .001 on an H100."""
    U, s, Vh = torch.linalg.svd(A, full_matrices=False, driver="gesvdj")
    for Q in (U, Vh.mT):
        error = torch.linalg.matrix_norm(Q.mT @ Q - torch.eye(len(s), dtype=s.dtype, device=s.device))
        if not error <= LARGEST_ERROR * len(s) ** 0.5:
            raise torch.linalg.LinAlgError(f"not orthonormal, by {float(error):.1g}")  # type: ignore[attr-defined]
    return U, s, Vh


def _by_gram_matrix(A: Tensor, form: Form) -> Sequence[Tensor]:
    return [part[0] for part in gram_svd(A[None], form=form)]


def _svd_of_transpose(A: Tensor) -> Sequence[Tensor]:
    V, s, Uh = torch.linalg.svd(A.mT.contiguous(), full_matrices=False)
    return Uh.mT, s, V.mT
