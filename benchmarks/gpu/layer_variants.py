"""The ways to compute a low-rank linear layer that the benchmark compares.

A new kernel is one line in :data:`FUNCTIONS`: a differentiable ``function(x, Vh, S, U, bias)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from hpc_oialr.lowrank.execution import dense_cost, factored_cost, merged_cost
from hpc_oialr.lowrank.layers import LowRankLinear

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
        layer = nn.Linear(
            factors.Vh.shape[1], factors.U.shape[0], device=factors.U.device, dtype=factors.U.dtype
        )
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


def folded(x: Tensor, Vh: Tensor, S: Tensor, U: Tensor, bias: Tensor | None) -> Tensor:
    """Five large products instead of seven: the core is folded into both bases first.

    Forward ``a = x Vh^T``, ``y = a (U S)^T``; backward ``db = dy U``, ``dS = db^T a``, ``dx = db (S Vh)``.
    Plain torch, as the reference for faster ones.
    """
    y: Tensor = _Folded.apply(x, Vh, S, U, bias)  # type: ignore[no-untyped-call]
    return y


class _Folded(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, Vh: Tensor, S: Tensor, U: Tensor, bias: Tensor | None) -> Tensor:
        a = F.linear(x, Vh)
        ctx.save_for_backward(a, Vh, S, U)
        return F.linear(a, U @ S, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, Vh, S, U = ctx.saved_tensors
        dy = grads[0]
        db = dy @ U
        return db @ (S @ Vh), None, db.mT @ a, None, dy.sum(0)


def folded_cost(tokens: int, m: int, n: int, r: int) -> int:
    """Multiply-adds of :func:`folded`: ``2 B r (m + n) + B r^2``, and ``r^2 (m + n)`` to fold."""
    return 2 * tokens * r * (m + n) + tokens * r * r + r * r * (m + n)


def _dense_cost(tokens: int, m: int, n: int, r: int) -> int:
    return dense_cost(tokens, m, n)


def _dense_numbers(tokens: int, m: int, n: int, r: int) -> int:
    return 3 * tokens * (m + n) + 3 * m * n


def _factored_numbers(tokens: int, m: int, n: int, r: int) -> int:
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


# Differentiable functions of (x, Vh, S, U, bias) beside the package's own layer: a kernel is one line here.
FUNCTIONS: dict[str, Product] = {"folded": folded}

VARIANTS: dict[str, Variant] = {
    "dense": Variant(dense, _dense_cost, _dense_numbers),
    "factored": Variant(package(1e9), factored_cost, _factored_numbers),
    "merged": Variant(package(0.0), merged_cost, _merged_numbers),
    **{
        name: Variant(function(product), folded_cost, _folded_numbers if name == "folded" else _fused_numbers)
        for name, product in FUNCTIONS.items()
    },
    "dense autocast": Variant(autocast(dense), _dense_cost, _dense_numbers, quarter_only=True),
    "factored autocast": Variant(autocast(package(1e9)), factored_cost, _factored_numbers, quarter_only=True),
}
