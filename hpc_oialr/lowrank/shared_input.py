"""Layers that are given the same tensor: query, key and value; the gate and up projections of an MLP.

On a GPU thin products take as long as reading their input, so x is multiplied by the stacked ``Vh`` of all of them at
once: it is read once, and its gradient is written once in place of being summed. Each layer keeps its own factors and r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_oialr.linalg.arithmetic import without_autocast
from hpc_oialr.lowrank.factored import is_plain, under_autocast
from hpc_oialr.lowrank.products import TORCH
from hpc_oialr.torch_compat import is_transformed

if TYPE_CHECKING:
    from hpc_oialr.lowrank.layers import LowRankLinear

# Names, within one module, of layers that the known model families call with one tensor; looked at again in each pass.
FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
)
# Elsewhere products are bound by their operations.
DEVICES = ("cuda",)
# Passes in a row with unequal inputs, after which the layers work by themselves.
PATIENCE = 8


def share_inputs(model: nn.Module) -> None:
    """Let the low-rank linear layers of each family in ``model`` multiply their input together."""
    from hpc_oialr.lowrank.layers import LowRankLinear

    for module in model.modules():
        for family in FAMILIES:
            found = [x for name in family if type(x := module._modules.get(name)) is LowRankLinear]
            layers = [x for x in found if x.n == found[-1].n]
            if len(layers) > 1 and any(x.shared_input is None or x.shared_input.layers != layers for x in layers):
                group = SharedInput(layers)
                for layer in layers:
                    layer.shared_input = group


class CoreFunction(torch.autograd.Function):
    """``y = a (C S)^T + bias`` of ``a = x A^T`` (B x r); derivatives of any order."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, S: Tensor, C: Tensor, bias: Tensor | None) -> Tensor:  # noqa: D102
        ctx.save_for_backward(a, S, C)
        return F.linear(a, C @ S, bias)

    @staticmethod
    @without_autocast()
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        a, S, C = ctx.saved_tensors
        for_a, for_S, for_C, for_bias = ctx.needs_input_grad
        db = dy @ C
        return (
            db @ S if for_a else None,
            db.mT @ a if for_S else None,
            dy.mT @ (a @ S.mT) if for_C else None,
            dy.sum(0) if for_bias else None,
        )


def _version(x: Tensor) -> int:
    """Changes with every write into ``x``; compiled code has none between its layers that it would not see itself."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


class SharedInput:
    """The layers of one family, and the parts of ``x [Vh_1; Vh_2; ...]^T`` that wait for their layers within a pass."""

    def __init__(self, layers: Sequence[LowRankLinear]) -> None:
        self.layers = list(layers)
        self._x: tuple[Tensor, int] | None = None
        self._parts: list[Tensor | None] = []
        self._misses = 0

    def output(self, layer: LowRankLinear, x: Tensor) -> Tensor | None:
        """``layer(x)``, or None where the layer computes it by itself."""
        if x.device.type not in DEVICES or self._misses >= PATIENCE or is_transformed():
            return None
        position = next(i for i, other in enumerate(self.layers) if other is layer)
        if self._x is None or x is not self._x[0] or _version(x) != self._x[1] or self._parts[position] is None:
            if any(part is not None for part in self._parts):
                self._misses += 1
            self._parts = self._multiply(x)
            self._x = (x, _version(x)) if self._parts else None
            if not self._parts:
                return None
        a, self._parts[position] = self._parts[position], None
        if all(part is None for part in self._parts):
            self._x, self._parts, self._misses = None, [], 0
        U, S, _ = layer.matched_factors()
        a, S, U, bias = under_autocast(a, S, U, layer.bias)
        y: Tensor = CoreFunction.apply(a, S, U, bias)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], layer.m)

    def _multiply(self, x: Tensor) -> list[Tensor | None]:
        """``x Vh^T`` of every layer; empty where one is dense again, or would not fold its core into its bases."""
        if any(getattr(layer, "shared_input", None) is not self for layer in self.layers):
            return []
        factors = [layer.matched_factors() for layer in self.layers]
        if not all(is_plain(x, Vh, S, U) for U, S, Vh in factors):
            return []
        rows = x.reshape(-1, x.shape[-1])
        cast = [under_autocast(rows, Vh, S, U) for U, S, Vh in factors]
        if not all(TORCH.serve(*each) for each in cast):
            return []
        if not all(layer.factored(rows.shape[0]) for layer in self.layers):
            return []
        stacked = torch.cat([Vh for _, Vh, _, _ in cast])
        return list(F.linear(cast[0][0], stacked).split([len(Vh) for _, Vh, _, _ in cast], dim=-1))

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a layer works by itself until its model is grouped again."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()
