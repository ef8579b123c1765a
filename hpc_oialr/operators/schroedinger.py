"""Schroedinger operators in the plane, ``H = -1/2 Laplacian + V`` (atomic units): their lowest states by networks.

The operator is ``T = shift - H``, whose leading eigenfunctions are the lowest states; the shift makes the wanted ones
positive. Integrals are means over random points, weighted by the inverse of their density.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from hpc_oialr.linalg.communicator import Communicator
from hpc_oialr.linalg.row_partition import block_of
from hpc_oialr.operators.nested_lora import Estimates, Side

Function = Callable[[Tensor], Tensor]
GOLDEN = (math.sqrt(5) - 1) / 2


@torch.enable_grad()
def jet(function: Function, x: Tensor) -> Tensor:
    """A function's value, its d derivatives and its Laplacian, at points x (B x d): (d + 2) x B x n, by autograd."""
    x = x.detach().requires_grad_()

    def derivative(y: Tensor, axis: int) -> Tensor:
        # Of all columns at once: backward is linear in what it starts from, and is itself differentiated by that. The
        # zeros are for linear functions, whose derivative would have no graph.
        start = torch.zeros_like(y, requires_grad=True)
        (slopes,) = torch.autograd.grad(y + 0 * x[:, :1] ** 2, x, start, create_graph=True)
        return torch.autograd.grad(slopes[:, axis].sum(), start, create_graph=True)[0]

    value = function(x)
    first = [derivative(value, axis) for axis in range(x.shape[1])]
    second = [derivative(slope, axis) for axis, slope in enumerate(first)]
    return torch.stack([value, *first, torch.stack(second).sum(0)]).detach()


class Wavefunctions(nn.Module):
    """``f_l(x) = exp(-kappa_l phi(x)) u_l(features(x))``: u is an MLP (tanh) with L outputs, kappa is trained too.

    Features and ``phi`` are given functions of the points (B x 2), computed in the points' precision.
    """

    def __init__(self, L: int, width: int, depth: int, features: Function, envelope: Function, decay: float) -> None:
        super().__init__()
        sizes = [features(torch.ones(1, 2)).shape[1], *[width] * depth, L]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.log_decay = nn.Parameter(torch.full((L,), math.log(decay)))
        self.features, self.envelope = features, envelope

    def forward(self, x: Tensor) -> Tensor:
        """Values, B x L."""
        h = self.features(x).to(self.log_decay)
        *hidden, last = self._linear()
        for layer in hidden:
            h = torch.tanh(layer(h))
        values: Tensor = last(h) * torch.exp(-self.log_decay.exp() * self.envelope(x).to(self.log_decay))
        return values

    def _linear(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    @torch.no_grad()
    def laplacian(self, x: Tensor) -> Tensor:
        """``Laplacian f_l``, B x L: forward mode by hand, at twice the cost of a value for each axis.

        Value, derivatives and Laplacian pass through a layer side by side, as one batch.
        """
        J = jet(self.features, x).to(self.log_decay)
        *hidden, last = self._linear()
        for layer in hidden:
            J = J @ layer.weight.mT
            t = torch.tanh(J[0] + layer.bias)
            d = 1 - t.square()
            curvature = J[1:-1].square().sum(0).mul_(t).mul_(-2)
            J[-1] += curvature
            J *= d
            J[0] = t
        J = J @ last.weight.mT
        u, du, lap_u = J[0] + last.bias, J[1:-1], J[-1]
        w = -self.log_decay.exp() * jet(self.envelope, x).to(self.log_decay)
        dw = w[1:-1]
        return torch.exp(w[0]) * (lap_u + 2 * (dw * du).sum(0) + u * (w[-1] + dw.square().sum(0)))


@dataclass(frozen=True)
class Schroedinger:
    """An operator with all that its states' networks and points need.

    Attributes
    ----------
    potential
        V at points, B.
    shift
        Of ``T = shift - H``.
    features, envelope, decay
        Of :class:`Wavefunctions`; ``decay`` is the first kappa.
    radius
        Radii of points from uniform numbers in (0, 1), and the inverse of their density in the plane; B each.
    exact
        The n lowest exact energies.
    extent
        Half the width of a picture that shows the lowest states.
    """

    potential: Function
    shift: float
    features: Function
    envelope: Function
    decay: float
    radius: Callable[[Tensor], tuple[Tensor, Tensor]]
    exact: Callable[[int], list[float]]
    extent: float
    width: int = 128
    depth: int = 3

    def functions(self, L: int) -> Wavefunctions:
        """L networks, with weights from torch's generator."""
        return Wavefunctions(L, self.width, self.depth, self.features, self.envelope, self.decay)

    def points(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points (B x 2, float64) and weights (B): radii in B strata, angles a golden one apart, both shifted at random.

        Each point has the wanted density, and together they fill the plane more evenly than independent ones, so that
        sums are closer to the integrals.
        """
        shifts = torch.rand(2, generator=generator, dtype=torch.float64).clamp_min(1e-9)
        number = torch.arange(batch, dtype=torch.float64)
        r, inverse_density = self.radius((number + shifts[0]) / batch)
        angle = 2 * math.pi * (number * GOLDEN + shifts[1])
        return torch.stack([r * angle.cos(), r * angle.sin()], dim=1), inverse_density / batch

    def sides(self, model: nn.Module, batch: int, generator: torch.Generator, comm: Communicator) -> list[Side]:
        """This rank's part of a minibatch."""
        assert isinstance(model, Wavefunctions)
        share = block_of(batch, comm.size, comm.rank)
        x, weight = (part[share] for part in self.points(batch, generator))
        values = model(x)
        image = (self.shift - self.potential(x))[:, None].to(values) * values.detach() + model.laplacian(x) / 2
        return [Side(values, image, weight.to(values))]

    def spectrum(self, found: Estimates) -> list[float]:
        """Energies: the functions' Rayleigh quotients of H."""
        return (self.shift - found.values).tolist()

    @torch.no_grad()
    def pictures(self, model: nn.Module, pixels: int = 101) -> Tensor:
        """Values on a square grid, L x pixels x pixels."""
        line = torch.linspace(-self.extent, self.extent, pixels, dtype=torch.float64)
        x = torch.cartesian_prod(line, line).flip(1)
        values: Tensor = model(x)
        return values.mT.reshape(-1, pixels, pixels)


def harmonic_oscillator() -> Schroedinger:
    """``V = r^2 / 2``: energies 1, 2, 2, 3, 3, 3, ..., n of them n times."""

    def radius(u: Tensor, scale: float = 1.5) -> tuple[Tensor, Tensor]:
        return scale * torch.sqrt(-2 * torch.log1p(-u)), 2 * math.pi * scale**2 / (1 - u)

    def energies(n: int) -> list[float]:
        return [float(level) for level in range(1, n + 1) for _ in range(level)][:n]

    def half_square(x: Tensor) -> Tensor:
        return x.square().sum(1, keepdim=True) / 2

    return Schroedinger(
        potential=lambda x: half_square(x)[:, 0],
        shift=8.0,
        features=lambda x: x / 2,
        envelope=half_square,
        decay=0.6,
        radius=radius,
        exact=energies,
        extent=4.5,
    )


def hydrogen() -> Schroedinger:
    """``V = -1 / r``: energies ``-1 / (2 (n - 1/2)^2)`` = -2, -2/9, -2/25, ..., 2 n - 1 states each."""

    def radius(u: Tensor, scale: float = 3.0) -> tuple[Tensor, Tensor]:
        # Dense at the origin as 1/r, where both terms of H are large.
        r = -scale * torch.log1p(-u)
        return r, 2 * math.pi * scale * r / (1 - u)

    def energies(n: int) -> list[float]:
        return [-0.5 / (level - 0.5) ** 2 for level in range(1, n + 1) for _ in range(2 * level - 1)][:n]

    def features(x: Tensor) -> Tensor:
        # r among them: states have a cusp at the origin. Both near and far is resolved.
        r = distance(x)
        rays = torch.cat([x, r], dim=1)
        return torch.cat([rays / (1 + r), rays / 6], dim=1)

    return Schroedinger(
        potential=lambda x: -1 / distance(x)[:, 0],
        shift=0.2,
        features=features,
        envelope=distance,
        decay=0.6,
        radius=radius,
        exact=energies,
        extent=16.0,
        width=64,
        depth=2,
    )


def distance(x: Tensor) -> Tensor:
    """From the origin, B x 1."""
    return x.square().sum(1, keepdim=True).sqrt()
