"""The ways to compute a low-rank linear layer that the benchmark compares, each a line in :data:`VARIANTS`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_oialr.lowrank.execution import dense_cost, factored_cost, merged_cost
from hpc_oialr.lowrank.layers import LowRankLinear
from hpc_oialr.lowrank.products import FUSED, TORCH, FactoredFunction, Kernels

Forward = Callable[[Tensor], Tensor]
Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
Count = Callable[[int, int, int, int], int]


@dataclass(frozen=True)
class Factors:
    """One layer's numbers; every variant computes the same function of them.

    Attributes
    ----------
    U, S, Vh, bias
        m x r, r x r, r x n, m; on the device, in the dtype of the measurement.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    bias: Tensor

    @staticmethod
    def random(m: int, n: int, r: int, device: torch.device, dtype: torch.dtype) -> Factors:
        """Orthonormal bases and a full core that keeps the size of its input."""
        U = torch.linalg.qr(torch.randn(m, r, device=device)).Q
        V = torch.linalg.qr(torch.randn(n, r, device=device)).Q
        S = torch.randn(r, r, device=device) / r**0.5
        bias = torch.randn(m, device=device)
        return Factors(*(t.to(dtype).contiguous() for t in (U, S, V.mT, bias)))


@dataclass(frozen=True)
class Built:
    """A variant ready to run: its forward, the trained tensors, and whether their first is the core."""

    forward: Forward
    trained: tuple[Tensor, Tensor]
    core: bool = True


@dataclass(frozen=True)
class Variant:
    """One way to compute the layer.

    Attributes
    ----------
    operations
        Multiply-adds forward and backward, of (tokens, m, n, r).
    numbers
        Numbers that cross the device's memory forward and backward, of the same; each product reads its
        operands and writes its result once.
    quarter_only
        Measured at r = k/4 alone.
    """

    build: Callable[[Factors], Built]
    operations: Count
    numbers: Count
    quarter_only: bool = False


def dense(factors: Factors) -> Built:
    """``nn.Linear`` with the weight ``U S Vh``."""
    m, n = factors.U.shape[0], factors.Vh.shape[1]
    layer = nn.Linear(n, m, device=factors.U.device, dtype=factors.U.dtype)
    with torch.no_grad():
        layer.weight.copy_(factors.U @ factors.S @ factors.Vh)
        layer.bias.copy_(factors.bias)
    return Built(layer, (layer.weight, layer.bias), core=False)


def package(crossover: float) -> Callable[[Factors], Built]:
    """The package's layer, made to run factored (a large ``crossover``) or merged (0)."""

    def build(factors: Factors) -> Built:
        layer = nn.Linear(factors.Vh.shape[1], factors.U.shape[0], device=factors.U.device, dtype=factors.U.dtype)
        with torch.no_grad():
            layer.bias.copy_(factors.bias)
        clones = (t.clone() for t in (factors.U, factors.S, factors.Vh))
        low = LowRankLinear.adopt(layer, *clones, crossover=crossover)
        return Built(low, (low.S, layer.bias))

    return build


def function(product: Product) -> Callable[[Factors], Built]:
    """A variant from a function of the factors."""

    def build(factors: Factors) -> Built:
        S, bias = (t.clone().requires_grad_() for t in (factors.S, factors.bias))
        return Built(lambda x: product(x, factors.Vh, S, factors.U, bias), (S, bias))

    return build


def autocast(build: Callable[[Factors], Built]) -> Callable[[Factors], Built]:
    """The same with float32 parameters under autocast, as in training: their casts are part of the time."""

    def with_float32(factors: Factors) -> Built:
        dtype = factors.U.dtype
        stored = Factors(*(t.float() for t in (factors.U, factors.S, factors.Vh, factors.bias)))
        built = build(stored)

        def forward(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, dtype):
                return built.forward(x)

        return replace(built, forward=forward)

    return with_float32


def three_products(x: Tensor, Vh: Tensor, S: Tensor, U: Tensor, bias: Tensor | None) -> Tensor:
    """Seven products of torch: three forward, four backward."""
    return F.linear(F.linear(F.linear(x, Vh), S), U, bias)


def by(kernels: Kernels) -> Product:
    """Five products, the core folded into both bases, by the given kernels."""

    def product(x: Tensor, Vh: Tensor, S: Tensor, U: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = FactoredFunction.apply(x, Vh, S, U, bias, kernels)[0]  # type: ignore[no-untyped-call]
        return y

    return product


def three_products_cost(tokens: int, m: int, n: int, r: int) -> int:
    """Multiply-adds of :func:`three_products`."""
    return 2 * tokens * r * (m + n) + 3 * tokens * r * r


def _dense_cost(tokens: int, m: int, n: int, r: int) -> int:
    return dense_cost(tokens, m, n)


def _dense_numbers(tokens: int, m: int, n: int, r: int) -> int:
    return 3 * tokens * (m + n) + 3 * m * n


def _three_products_numbers(tokens: int, m: int, n: int, r: int) -> int:
    # x, a | a, b | b, y forward; dy, db | db, dc | dc, dx and db, a backward.
    return tokens * (2 * (m + n) + 10 * r) + 2 * r * (m + n) + 3 * r * r


def _folded_numbers(tokens: int, m: int, n: int, r: int) -> int:
    # x, a | a, y forward; dy, db | db, dx | db, a backward.
    return tokens * (2 * (m + n) + 6 * r) + 4 * r * (m + n)


def _fused_numbers(tokens: int, m: int, n: int, r: int) -> int:
    """As folded, with each r-wide tile kept on the chip between its two products."""
    return tokens * (2 * (m + n) + 4 * r) + 4 * r * (m + n)


def _merged_numbers(tokens: int, m: int, n: int, r: int) -> int:
    return _dense_numbers(tokens, m, n, r) + 3 * m * n + 4 * r * (m + n)


def _fused_is_there() -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec("triton") is not None


VARIANTS: dict[str, Variant] = {
    "dense": Variant(dense, _dense_cost, _dense_numbers),
    # The package's choice among what follows, by its own measurement.
    "factored": Variant(package(1e9), factored_cost, _folded_numbers),
    "merged": Variant(package(0.0), merged_cost, _merged_numbers),
    "three products": Variant(function(three_products), three_products_cost, _three_products_numbers),
    "folded": Variant(function(by(TORCH)), factored_cost, _folded_numbers),
    **(
        {"fused": Variant(function(by(FUSED)), factored_cost, _fused_numbers, quarter_only=True)}
        if _fused_is_there()
        else {}
    ),
    "dense autocast": Variant(autocast(dense), _dense_cost, _dense_numbers, quarter_only=True),
    "factored autocast": Variant(autocast(package(1e9)), factored_cost, _folded_numbers, quarter_only=True),
}
