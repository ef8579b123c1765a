"""Back to an ordinary dense model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TypeVar

from torch import nn
from torch.distributed.tensor import DTensor

from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.blocks import orthogonality_error
from hpc_oialr.lowrank.attachment import untie
from hpc_oialr.lowrank.attention import FactorisedMultiheadAttention, repack
from hpc_oialr.lowrank.base import LowRankWeight, rounding_bound

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
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LowRankWeight)}
    _warn_of_written_bases(layers)
    for layer in layers.values():
        layer.become_dense()
    for module in list(model.modules()):
        if isinstance(module, FactorisedMultiheadAttention):
            repack(module)
        elif isinstance(module, nn.TransformerEncoder) and hasattr(module, "dense_use_nested_tensor"):
            module.use_nested_tensor = module.__dict__.pop("dense_use_nested_tensor")
    return model


def _warn_of_written_bases(layers: Mapping[str, LowRankWeight]) -> None:
    """A copy whose parameters were averaged or decayed one by one is a product of three wrong factors."""
    written = [name for name, layer in layers.items() if _is_written(layer)]
    if written:
        warnings.warn(
            f"U or Vh of {', '.join(written)} is not orthonormal: something has written into these frozen bases, such "
            "as an average, a clipping or a decay over model.parameters(), and the merged weight is wrong if that was "
            "meant for weights. Give averages to OIALR(..., averages=[...]), and let loops skip what does not require "
            "a gradient.",
            stacklevel=4,
        )


def _is_written(layer: LowRankWeight) -> bool:
    # Factors that are still to be filled from a checkpoint are zero.
    if layer.bases_trained or isinstance(layer.U, DTensor) or layer.S.is_meta or not bool(layer.S.any()):
        return False
    bound = rounding_bound(layer.U.dtype)
    return max(orthogonality_error(layer.U), orthogonality_error(layer.Vh.mT)) > bound
