"""SVDs of square float32 matrices: which way is fastest, and how exact is it.

``residual`` is ||A - U diag(s) Vh|| / ||A||, ``orthogonality`` the larger ||Q^T Q - I|| / sqrt(n) of both bases
(Frobenius norms, computed in float64). Entries are normal, as of a fresh weight: the smallest singular value is
about 1/n of the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks.common import Row
from benchmarks.gpu.runner import Case, Context
from benchmarks.gpu.timing import timed
from hpc_oialr.linalg.gram_svd import FORMS, gram_svd
from hpc_oialr.linalg.svd import svd as package_svd

Triplets: TypeAlias = tuple[Tensor, Tensor, Tensor]
SIZES = (768, 384, 192, 96, 2048, 1024)
BATCHED_UP_TO = 768
# A few layers of one shape, as on a rank of many; the layers of a ViT-B/16, at their r in updates.
BATCHES = {8: SIZES, 73: (96, 192, 384, 768)}


def cases(context: Context) -> Sequence[Case]:
    """Every way at every size, one matrix; then batches, by the ways that a batch could be good for."""
    if context.tiny:
        shapes = [(24, 2, name) for name in METHODS]
    else:
        shapes = [(n, 1, name) for n in SIZES for name in METHODS if name not in FOR_BATCHES]
        shapes += [
            (n, batch, name)
            for batch, sizes in BATCHES.items()
            for n in sizes
            for name in METHODS
            if n <= BATCHED_UP_TO and (name in FOR_BATCHES or (batch == 8 and name not in ONE_BY_ONE))
        ]
    return [
        Case(f"n = {n}, {batch} at once, {name}", partial(measure, n, batch, name, context))
        for n, batch, name in shapes
    ]


def measure(n: int, batch: int, name: str, context: Context) -> Iterator[Row]:
    """One row."""
    torch.manual_seed(n)
    A = torch.randn(batch, n, n, device=context.device) / n**0.5
    A = A[0] if batch == 1 else A
    call = partial(METHODS[name], A)
    U, s, Vh = call()
    timing = timed(call, context.device, seconds=0.01 if context.tiny else 0.3)
    yield {
        "n": n,
        "batch": batch,
        "way": name,
        "ms": timing.ms,
        "ms_per_matrix": timing.ms / batch,
        "spread": timing.spread,
        "residual": residual(A, U, s, Vh),
        "orthogonality": max(orthogonality(U), orthogonality(Vh.mT)),
    }


def residual(A: Tensor, U: Tensor, s: Tensor, Vh: Tensor) -> float:
    """Of the worst matrix of a batch."""
    A, U, s, Vh = (t.double() for t in (A, U, s, Vh))
    error = torch.linalg.matrix_norm(A - U @ (s.unsqueeze(-1) * Vh)) / torch.linalg.matrix_norm(A)
    return float(error.max().item())


def orthogonality(Q: Tensor) -> float:
    """Of the worst matrix of a batch."""
    Q = Q.double()
    gap = Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    worst = float(torch.linalg.matrix_norm(gap).max().item())
    return worst / math.sqrt(Q.shape[-1])


def _driver(driver: str) -> Callable[[Tensor], Triplets]:
    def call(A: Tensor) -> Triplets:
        # LAPACK has no such choice.
        U, s, Vh = torch.linalg.svd(A, full_matrices=False, driver=driver if A.is_cuda else None)
        return U, s, Vh

    return call


def gram(A: Tensor, dtype: torch.dtype) -> Triplets:
    """``A^T A = V diag(s^2) V^T``, then ``U = A V / s``: small singular values lose half their digits."""
    B = A.to(dtype)
    squares, V = torch.linalg.eigh(B.mT @ B)
    s = squares.clamp_min(torch.finfo(dtype).tiny).sqrt().flip(-1)
    V = V.flip(-1)
    U = (B @ V) / s.unsqueeze(-2)
    return U.to(A.dtype), s.to(A.dtype), V.mT.to(A.dtype)


def on_host(A: Tensor) -> Triplets:
    """Copied to the host, gesdd there, copied back."""
    U, s, Vh = torch.linalg.svd(A.cpu(), full_matrices=False)
    return U.to(A.device), s.to(A.device), Vh.to(A.device)


def by_package(A: Tensor) -> Triplets:
    """The package's ``svd``, checks included, matrix by matrix."""
    if A.dim() == 2:
        U, s, Vh = package_svd(A)
        return U, s, Vh
    parts = [package_svd(matrix) for matrix in A]
    U, s, Vh = (torch.stack(part) for part in zip(*parts, strict=True))
    return U, s, Vh


METHODS: dict[str, Callable[[Tensor], Triplets]] = {
    "gesvdj": _driver("gesvdj"),
    "gesvd": _driver("gesvd"),
    "gesvda": _driver("gesvda"),
    "eigh of A^T A, fp64": partial(gram, dtype=torch.float64),
    "eigh of A^T A, fp32": partial(gram, dtype=torch.float32),
    "host LAPACK": on_host,
    **{f"gram_svd, {form}": partial(gram_svd, form=form) for form in FORMS},
    "package": by_package,
}
FOR_BATCHES = tuple(f"gram_svd, {form}" for form in FORMS)
ONE_BY_ONE = ("host LAPACK", "package")
