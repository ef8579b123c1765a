"""Operators given by a kernel k(x, y): ``(T g)(x) = integral of k(x, y) g(y)``, by the points of a minibatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpc_oialr.errors import ConfigError, NonFiniteError
from hpc_oialr.linalg.communicator import Communicator
from hpc_oialr.linalg.row_partition import block_of, even_blocks
from hpc_oialr.linalg.svd import count_non_finite, svd
from hpc_oialr.operators.nested_lora import Estimates, Side

Kernel = Callable[[Tensor, Tensor], Tensor]


class Points(NamedTuple):
    """The points of a minibatch on all ranks, the same on each."""

    x: Tensor  # B x d, or B indices
    weight: Tensor  # B


def kernel_sides(
    kernel: Kernel,
    f: nn.Module,
    at: Points,
    g: nn.Module | None = None,
    to: Points | None = None,
    *,
    comm: Communicator,
) -> list[Side]:
    """This rank's sides of a minibatch: the image of g at its points ``at``, and of f at its points ``to``.

    Parameters
    ----------
    kernel
        ``kernel(x, y)`` is the matrix of ``k(x_a, y_b)``; must be symmetric if there is no ``g``.
    f, g
        Networks that give ``B x L`` values; with f alone, eigenfunctions are meant.

    Each rank computes its rows of k, ``B^2 / P`` values (twice that for two sides), and sends ``B L`` numbers a side.
    The sums over points are those of the sample: for eigenfunctions ``k(x, x)`` makes them larger, by about 1 / B.
    """
    if (g is None) != (to is None):
        raise ConfigError("to", "given without g" if g is None else None, "must be given together with g")
    mine, whole = _values(f, at, comm)
    if g is None or to is None:
        return [Side(mine, _image(kernel, at, at, whole, comm), _share(at.weight, comm))]
    others, whole_g = _values(g, to, comm)
    adjoint: Kernel = lambda y, x: kernel(x, y).mT  # noqa: E731
    return [
        Side(mine, _image(kernel, at, to, whole_g, comm), _share(at.weight, comm)),
        Side(others, _image(adjoint, to, at, whole, comm), _share(to.weight, comm)),
    ]


def _share(points: Tensor, comm: Communicator) -> Tensor:
    return points[block_of(len(points), comm.size, comm.rank)]


def _values(f: nn.Module, points: Points, comm: Communicator) -> tuple[Tensor, Tensor]:
    """Of this rank's points, and of all, without a graph."""
    mine: Tensor = f(_share(points.x, comm))
    return mine, comm.all_gather_rows(mine.detach(), even_blocks(len(points.x), comm.size))


@torch.no_grad()
def _image(kernel: Kernel, at: Points, source: Points, values: Tensor, comm: Communicator) -> Tensor:
    return kernel(_share(at.x, comm), source.x) @ (source.weight[:, None] * values)


class MatrixProblem:
    """A matrix as an operator from functions of its column's number to functions of its row's, tables of their values.

    Minibatches are rows and columns without repetition.
    """

    def __init__(self, A: Tensor) -> None:
        if A.dim() != 2 or not A.is_floating_point():
            raise ConfigError("matrix", f"{tuple(A.shape)}, {A.dtype}", "must have two axes and floating-point values")
        if bad := count_non_finite(A):
            raise NonFiniteError(f"matrix holds {bad} NaN or Inf among {A.numel()} values; an SVD needs finite ones.")
        self.A = A

    def functions(self, L: int) -> nn.ModuleList:
        """Tables of m x L and n x L, drawn from torch's generator."""
        most = min(self.A.shape)
        if most < L:
            raise ConfigError("functions", L, f"must be at most {most}", fix="The matrix has no more.")
        drawn = (0.1 * torch.randn(size, L, dtype=self.A.dtype) for size in self.A.shape)
        return nn.ModuleList(nn.Embedding.from_pretrained(table, freeze=False) for table in drawn)

    def sides(self, model: nn.Module, batch: int, generator: torch.Generator, comm: Communicator) -> list[Side]:
        """A minibatch of ``batch`` rows and as many columns, or of all if there are no more."""
        f, g = model.children()
        rows, columns = (self._drawn(size, batch, generator) for size in self.A.shape)
        return kernel_sides(self._entries, f, rows, g, columns, comm=comm)

    def spectrum(self, found: Estimates) -> list[float]:
        """Singular values."""
        return found.values.tolist()

    def exact(self, L: int) -> list[float]:
        """The largest singular values, by LAPACK."""
        return svd(self.A).s[:L].tolist()

    @torch.no_grad()
    def alignments(self, model: nn.Module) -> list[float]:
        """Of each pair of functions the smaller |cosine| with the exact vectors of its number."""
        U, _, Vh = svd(self.A)
        pairs = [(F / F.norm(dim=0), V) for F, V in zip(model.parameters(), (U, Vh.mT), strict=True)]
        cosines = [(F * V[:, : F.shape[1]]).sum(0).abs() for F, V in pairs]
        return torch.minimum(*cosines).tolist()

    def _entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self.A[rows][:, columns]

    def _drawn(self, size: int, batch: int, generator: torch.Generator) -> Points:
        count = min(size, batch)
        drawn = torch.arange(size) if count == size else torch.randperm(size, generator=generator)[:count]
        return Points(drawn, torch.full((count,), size / count, dtype=self.A.dtype))
