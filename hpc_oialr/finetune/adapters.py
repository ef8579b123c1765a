"""A model's adapted layers: list, merge, experts' load."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from hpc_oialr.finetune.layers import AdaptedLinear, MoSaraLinear

Model = TypeVar("Model", bound=nn.Module)


def adapters(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear)}


@torch.no_grad()
def merge_adapters(model: Model, *, inplace: bool = False, by_mean_load: bool = False) -> Model:
    """A plain dense model with the original classes and parameter names.

    Parameters
    ----------
    model
        Any module, with or without adapted layers.
    inplace
        Change ``model`` itself; otherwise it is copied first.
    by_mean_load
        Merge Mo-SARA's layers with the mean gates of the training in place of the router. An approximation: outputs
        change. Otherwise such a layer is a ModelError.
    """
    if not adapters(model):
        return model
    model = model if inplace else copy.deepcopy(model)
    # All before the first is replaced: a model of which one cannot be merged stays as it is.
    dense = {name: layer.merged(mean=by_mean_load) for name, layer in adapters(model).items()}
    for name, each in dense.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, each)
    return model


def expert_load(model: nn.Module) -> dict[str, Tensor]:
    """For each Mo-SARA layer the mean gate of every expert over the tokens of the training (E, sums to 1)."""
    found = {name: layer for name, layer in adapters(model).items() if isinstance(layer, MoSaraLinear)}
    return {name: layer.load.detach().clone() for name, layer in found.items()}
