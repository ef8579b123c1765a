"""Back to an ordinary dense model."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.lowrank.attachment import untie
from hpc_oialr.lowrank.attention import FactorisedMultiheadAttention, repack
from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.marks import pass_on_attributes

Model = TypeVar("Model", bound=nn.Module)


@exact_arithmetic()
def merge(model: Model, *, inplace: bool = False) -> Model:
    """A dense model with the original classes, parameter names, order and dtypes.

    Its state dict loads into the untouched original model with ``strict=True``.

    Parameters
    ----------
    model
        Any module, with or without low-rank layers.
    inplace
        Change ``model`` itself; otherwise it is copied first (which takes the memory of a copy).
    """
    if not inplace:
        model = copy.deepcopy(model)
        untie(model)
    for module in list(model.modules()):
        if isinstance(module, LowRankWeight):
            _merge_layer(module)
    for module in list(model.modules()):
        if isinstance(module, FactorisedMultiheadAttention):
            repack(module)
        elif isinstance(module, nn.TransformerEncoder) and hasattr(module, "dense_use_nested_tensor"):
            module.use_nested_tensor = module.__dict__.pop("dense_use_nested_tensor")
    return model


def _merge_layer(layer: LowRankWeight) -> None:
    weight = nn.Parameter(layer.merged_weight(), requires_grad=layer.S.requires_grad)
    pass_on_attributes(layer.S, weight)
    for attribute in ("bases_trained", "written"):
        layer.__dict__.pop(attribute, None)
    rest = {name: p for name, p in layer._parameters.items() if name not in ("U", "S", "Vh")}
    layer.__class__ = layer.dense_class  # type: ignore[assignment]
    layer.__dict__.pop("autocast_copies", None)
    for attribute in ("dense_class", "dense_shape", "crossover"):
        delattr(layer, attribute)
    # The kinds this project knows register their weight before their bias.
    layer._parameters.clear()
    layer._parameters.update({"weight": weight, **rest})
