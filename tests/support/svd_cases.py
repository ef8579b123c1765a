"""Matrices with known spectra, ways to cut them into row blocks, and errors of an SVD."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = {"tall": (150, 24), "square": (40, 40), "wide": (20, 130), "few_rows": (6, 5)}
DTYPES = (torch.float32, torch.float64)


class Case(NamedTuple):
    """A matrix and what it is called."""

    name: str
    A: Tensor


def spectrum(kind: str, k: int) -> Tensor:
    """Singular values, float64."""
    match kind:
        case "rank_deficient":
            return torch.cat([torch.linspace(2, 1, (k + 1) // 2), torch.zeros(k // 2)]).double()
        case "graded":
            return torch.logspace(0, -12, k, dtype=torch.float64)
        case "clustered":
            return torch.ones(k, dtype=torch.float64) + 1e-9 * torch.arange(k, 0, -1, dtype=torch.float64)
        case "falling":
            return 0.8 ** torch.arange(k, dtype=torch.float64)
    raise AssertionError(kind)


SPECTRA = ("random", "rank_deficient", "graded", "clustered", "falling")
# For real processes, where a message takes a thousand times longer than between threads.
FEW = (
    "tall",
    "square random float32",
    "wide random float32",
    "wide graded float64",
    "few_rows random float64",
)


def with_spectrum(m: int, n: int, s: Tensor, seed: int = 0) -> Tensor:
    """A random m x n matrix with these singular values, float64."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, len(s), dtype=torch.float64, generator=generator)).Q for size in (m, n))
    return U @ torch.diag(s) @ V.mT


def cases() -> Iterator[Case]:
    """Every spectrum in every shape and dtype."""
    for shape_name, (m, n) in SHAPES.items():
        for kind in SPECTRA:
            generator = torch.Generator().manual_seed(m + n)
            random = torch.randn(m, n, dtype=torch.float64, generator=generator)
            A = random if kind == "random" else with_spectrum(m, n, spectrum(kind, min(m, n)))
            for dtype in DTYPES:
                yield Case(f"{shape_name} {kind} {str(dtype)[6:]}", A.to(dtype))


def few_cases() -> list[Case]:
    """Every spectrum and dtype in the tall shape, and each of the other shapes."""
    return [case for case in cases() if case.name.startswith(FEW)]


def heights(m: int, size: int) -> list[int]:
    """Uneven blocks; with three processes and more the second one is empty."""
    weights = [0 if p == 1 and size > 2 else 1 + p % 3 for p in range(size)]
    cut = [m * sum(weights[: p + 1]) // sum(weights) for p in range(size)]
    return [b - a for a, b in zip([0, *cut], cut, strict=False)]


def block(A: Tensor, rank: int, size: int) -> Tensor:
    """Process ``rank``'s rows."""
    return A.split(heights(A.shape[0], size))[rank]


class Errors(NamedTuple):
    """Relative residual, loss of orthogonality of U and V, largest error of s relative to s_0."""

    residual: float
    U: float
    V: float
    s: float


def errors(A: Tensor, U: Tensor, s: Tensor, Vh: Tensor) -> Errors:
    """All measured in float64, singular values against LAPACK's in float64."""
    A, U, s, Vh = (part.double() for part in (A, U, s, Vh))
    size = torch.linalg.matrix_norm(A)
    exact = torch.linalg.svdvals(A)[: len(s)]
    eye = torch.eye(len(s), dtype=torch.float64)
    return Errors(
        float(torch.linalg.matrix_norm(A - U @ torch.diag(s) @ Vh) / size),
        float(torch.linalg.matrix_norm(U.mT @ U - eye)),
        float(torch.linalg.matrix_norm(Vh @ Vh.mT - eye)),
        float((s - exact).abs().max() / exact[0]),
    )


def lapack_errors(A: Tensor) -> Errors:
    """LAPACK's own, in the matrix's dtype."""
    return errors(A, *torch.linalg.svd(A, full_matrices=False))


def best_error(A: Tensor, r: int) -> float:
    """The smallest ``||A - B||_F`` for B of matrix rank r."""
    return float(torch.linalg.vector_norm(torch.linalg.svdvals(A.double())[r:]))
