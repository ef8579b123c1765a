"""The weights of a model that can be low-rank, before and after their conversion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank.attention import PROJECTIONS, FactorisedMultiheadAttention
from hpc_oialr.lowrank.base import LowRankWeight, whole_shape

KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention", "Conv1D")


def kind_of(layer: type[nn.Module]) -> str | None:
    """Name of the layer kind, or None if it is not one of :data:`KINDS` (subclasses are unknown kinds)."""
    sharded = layer.__dict__.get("low_rank_kind")  # an engine's class, put on a layer of this kind
    if sharded is not None:
        return str(sharded)
    if layer in (nn.Linear, NonDynamicallyQuantizableLinear):
        return "Linear"
    if layer in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention):
        return layer.__name__
    if layer.__name__ == "Conv1D" and layer.__module__ == "transformers.pytorch_utils":
        return "Conv1D"
    return None


@dataclass(eq=False)
class TargetWeight:
    """One weight that can be low-rank: a layer's ``weight``, or an attention's input projection."""

    name: str  # dotted name of the layer that holds, or will hold, the factors
    owner: nn.Module  # has the dense parameter
    parameter: str  # its name in the owner
    kind: str  # one of KINDS

    @property
    def holder(self) -> nn.Module:
        """The module that holds the weight now: the owner, or an unpacked attention's projection."""
        if isinstance(self.owner, FactorisedMultiheadAttention) and self.parameter in PROJECTIONS:
            return self.owner.get_submodule(PROJECTIONS[self.parameter])
        return self.owner

    @property
    def low_rank(self) -> LowRankWeight | None:
        """The low-rank layer, or None while the weight is dense."""
        holder = self.holder
        return holder if isinstance(holder, LowRankWeight) else None

    @property
    def weight(self) -> nn.Parameter:
        """The dense weight (any number of axes); only before the conversion."""
        if (parameter := self.stored) is None:
            raise ModelError(
                f"layer {self.name} has no parameter {self.weight_name!r} any more: it was parametrized, pruned or "
                "removed after OIALR(...). Do so before, and the layer is left dense."
            )
        return parameter

    @property
    def weight_name(self) -> str:
        """Name of the dense weight in :attr:`holder`."""
        return self.parameter if self.holder is self.owner else "weight"

    @property
    def stored(self) -> nn.Parameter | None:
        """The dense weight; None where it was made something else than a parameter."""
        return self.holder._parameters.get(self.weight_name)

    @property
    def trained(self) -> nn.Parameter:
        """What the optimizer trains: the dense weight, later the core ``S``."""
        layer = self.low_rank
        return self.weight if layer is None else layer.S

    @property
    def shape(self) -> tuple[int, int]:
        """m and n: (leading axis) x (all the rest)."""
        if (layer := self.low_rank) is not None:
            return layer.m, layer.n
        shape = whole_shape(self.weight)
        return shape[0], shape.numel() // max(1, shape[0])

    @property
    def dense_shape(self) -> torch.Size:
        """Of the dense weight, with all its axes."""
        return whole_shape(self.weight) if (layer := self.low_rank) is None else layer.dense_shape

    @property
    def k(self) -> int:
        """min(m, n)."""
        return min(self.shape)


def plain_name(name: str) -> str:
    """A layer's name without the wrapper that ``torch.compile`` puts around a model or a part of it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def every_weight(model: nn.Module) -> list[TargetWeight]:
    """Every weight of a known kind, dense or low-rank, in the order of the dense model."""
    targets: list[TargetWeight] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        # TensorEngine shards projections as separate linear layers.
        unpacked = isinstance(module, FactorisedMultiheadAttention) and any(
            isinstance(child, LowRankWeight) and not hasattr(child, "shard_spec")
            for child in map(module._modules.get, PROJECTIONS.values())
        )
        kind = "MultiheadAttention" if unpacked else kind_of(type(module))
        if module in inside:
            continue
        if kind == "MultiheadAttention":
            for parameter, child in PROJECTIONS.items():
                if module._parameters.get(parameter) is not None or (unpacked and child in module._modules):
                    path = f"{name}.{child}" if name else child
                    targets.append(TargetWeight(path, module, parameter, kind))
                    inside |= {module._modules[child]} if unpacked else set()
        elif isinstance(module, LowRankWeight):
            targets.append(TargetWeight(name, module, "weight", kind_of(module.dense_class) or "Linear"))
        elif kind is not None and isinstance(getattr(module, "weight", None), Tensor):
            targets.append(TargetWeight(name, module, "weight", kind))
    return targets
