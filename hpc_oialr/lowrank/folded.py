"""Low-rank layers for inference: two factors in place of three, the core folded into one of them, nothing trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_oialr.errors import ModelError
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.svd import compute_dtype
from hpc_oialr.lowrank.attachment import untie
from hpc_oialr.lowrank.attention import FactorisedMultiheadAttention, repack, unpack
from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.conversion import leave_fused_inference, low_rank_layers
from hpc_oialr.lowrank.kernel_modes import is_tucker, times
from hpc_oialr.lowrank.targets import TargetWeight, every_weight, kind_of

Model = TypeVar("Model", bound=nn.Module)


class FoldedWeight(nn.Module):
    """A layer of two products: ``down`` to r features, ``up`` to the outputs; of plain operations of torch.

    For ``W = U S Vh`` they are ``Vh`` and ``U S``: ``r (m + n)`` numbers, where the trained layer holds ``r^2`` more.
    """

    down: nn.Parameter
    up: nn.Parameter
    bias: nn.Parameter | None

    @property
    def r(self) -> int:
        """Inner dimension."""
        return int(self.down.shape[0])

    def take(self, down: Tensor, up: Tensor) -> None:
        """Hold these two factors, before the bias, and no other weight."""
        rest = {name: p for name, p in self._parameters.items() if name not in ("weight", "U", "S", "Vh")}
        factors = {"down": down, "up": up}
        self._parameters.clear()
        for name, factor in factors.items():
            self.register_parameter(name, nn.Parameter(factor.contiguous(), requires_grad=False))
        self._parameters.update(rest)

    def extra_repr(self) -> str:
        """The shapes, as ``print(model)`` shows them."""
        return f"down={tuple(self.down.shape)}, up={tuple(self.up.shape)}, bias={self.bias is not None}"


class FoldedLinear(FoldedWeight):
    """In place of a linear layer, of an attention's projection too: ``down`` is r x in, ``up`` out x r."""

    def forward(self, x: Tensor) -> Tensor:
        """Input (..., in), output (..., out)."""
        return F.linear(F.linear(x, self.down), self.up, self.bias)

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that reads it."""
        return self.up @ self.down


class FoldedConv1D(FoldedLinear):
    """In place of transformers' ``Conv1D``, whose weight is in x out."""

    @property
    def weight(self) -> Tensor:
        """The dense weight, for code that reads it."""
        return (self.up @ self.down).mT


class _FoldedConv(FoldedWeight, nn.modules.conv._ConvNd):  # type: ignore[misc]
    """A convolution with r filters, then one of extent one."""

    def forward(self, input: Tensor) -> Tensor:
        """Input (B, in, extents), output (B, out, extents), as the dense layer's."""
        convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[len(self.kernel_size) - 1]
        return convolve(self._conv_forward(input, self.down, None), self.up, self.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight, for code that reads it."""
        return cast(Tensor, (self.up.flatten(1) @ self.down.flatten(1)).unflatten(1, self.down.shape[1:]))


class FoldedConv1d(_FoldedConv, nn.Conv1d):  # type: ignore[misc]
    """In place of ``nn.Conv1d``."""


class FoldedConv2d(_FoldedConv, nn.Conv2d):  # type: ignore[misc]
    """In place of ``nn.Conv2d``."""


class FoldedConv3d(_FoldedConv, nn.Conv3d):  # type: ignore[misc]
    """In place of ``nn.Conv3d``."""


LAYERS: dict[str, type[FoldedWeight]] = {
    "Linear": FoldedLinear,
    "MultiheadAttention": FoldedLinear,
    "Conv1D": FoldedConv1D,
    "Conv1d": FoldedConv1d,
    "Conv2d": FoldedConv2d,
    "Conv3d": FoldedConv3d,
}


@exact_arithmetic()
def fold(model: Model, *, inplace: bool = False) -> Model:
    """A model for inference, in evaluation mode: of every low-rank layer two factors, or its dense weight if smaller.

    The outputs are those of ``model`` but for rounding. Nothing in it can be trained.

    Parameters
    ----------
    model
        Any module; without low-rank layers nothing but its mode and ``requires_grad`` change.
    inplace
        Change ``model`` itself; otherwise it is copied first (which takes the memory of a copy).
    """
    if not inplace:
        model = copy.deepcopy(model)
        untie(model)
    for layer in low_rank_layers(model).values():
        if layer.r * (layer.m + layer.n) >= layer.m * layer.n:
            layer.become_dense()
        else:
            _fold_layer(layer)
    _settle(model)
    return model.requires_grad_(False).eval()


def _fold_layer(layer: LowRankWeight) -> None:
    kind, shape = kind_of(layer.dense_class) or "Linear", layer.dense_shape
    U, S, Vh = (factor.detach().to(compute_dtype(layer.S.dtype)) for factor in layer.factors)
    if kind == "Conv1D":
        down, up = U.mT, (S @ Vh).mT
    else:
        # A Tucker layer becomes r_out filters of the whole extent, and a convolution of extent one.
        down, up = (times(S, Vh), U) if is_tucker(S, Vh) else (Vh, U @ S)
        if kind.startswith("Conv"):
            down, up = down.reshape(-1, *shape[1:]), up.reshape(*up.shape, *(1,) * (len(shape) - 2))
    dtype = layer.S.dtype
    layer.__class__ = LAYERS[kind]  # type: ignore[assignment]
    for attribute in LowRankWeight.__annotations__:
        layer.__dict__.pop(attribute, None)
    cast(FoldedWeight, layer).take(down.to(dtype), up.to(dtype))


def _settle(model: nn.Module) -> None:
    """Give attentions without a folded projection their class back; keep torch's fused inference off folded layers."""
    leave_fused_inference(model)
    for module in list(model.modules()):
        if isinstance(module, FactorisedMultiheadAttention):
            projections = [child for name, child in module.named_children() if name != "out_proj"]
            if not any(isinstance(child, FoldedWeight) for child in projections):
                repack(module)
        elif isinstance(module, nn.TransformerEncoderLayer) and folded_layers(module):
            module.activation_relu_or_gelu = 0  # its fused kernel would multiply the factors in every pass


def folded_layers(model: nn.Module) -> dict[str, FoldedWeight]:
    """The folded layers of ``model`` by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, FoldedWeight)}


def empty_folded(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Give layers of a dense ``model`` two empty factors of inner dimension ``ranks[name]``, in place, to be loaded.

    Raises :class:`ModelError` if the model has no such layer.
    """
    targets = {target.name: target for target in every_weight(model)}
    if unknown := [name for name in ranks if name not in targets]:
        raise ModelError(
            f"the exported model has a layer {unknown[0]!r} of two factors, and {type(model).__name__} has none of that "
            "name: it was exported from another model, or another version of its class."
        )
    for name, r in ranks.items():
        _empty(targets[name], r)
    _settle(model)
    model.requires_grad_(False).eval()


def _empty(target: TargetWeight, r: int) -> None:
    weight = target.weight
    empty = partial(torch.empty, dtype=weight.dtype, device=weight.device)
    shape: Sequence[int] = weight.shape
    if target.kind == "MultiheadAttention":
        unpack(target.owner)  # type: ignore[arg-type]
    if target.kind == "Conv1D":
        shape = shape[::-1]
    layer = target.holder
    layer.__class__ = LAYERS[target.kind]
    ones = (1,) * (len(shape) - 2)
    cast(FoldedWeight, layer).take(empty(r, *shape[1:]), empty(shape[0], r, *ones))
