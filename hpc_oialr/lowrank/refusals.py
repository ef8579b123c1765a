"""Why a weight stays dense: what its user did to it would not survive the conversion, or its kind is unknown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from hpc_oialr.lowrank.base import LowRankWeight, whole_shape
from hpc_oialr.lowrank.marks import gradient_hooks, own_attributes

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# Whose classes low-rank layers can take the place of.
FORWARDS = ("torch", "transformers", "hpc_oialr")


class Refusal(NamedTuple):
    """A reason, and whether the user should be warned of it since nothing in the settings says so."""

    reason: str
    warn: bool = False


def value_refusal(weight: Tensor) -> Refusal | None:
    """Why the numbers of a weight cannot be factorised, or None: dtype, layout, kind of tensor."""
    # FakeTensor: the dry run of a plan has such.
    ordinary = type(weight) in (Tensor, nn.Parameter, DTensor) or type(weight).__name__ == "FakeTensor"
    if not ordinary:
        return Refusal(f"its weight is a {type(weight).__name__}", warn=True)
    if weight.dtype not in DTYPES:
        return Refusal(f"its weight is of dtype {str(weight.dtype).removeprefix('torch.')}", warn=True)
    if weight.layout is not torch.strided:
        return Refusal(f"its weight is stored as {str(weight.layout).removeprefix('torch.')}", warn=True)
    return None


def use_refusal(holder: nn.Module, weight: nn.Parameter) -> Refusal | None:
    """Why a weight's layer cannot change its class without a loss, or None: hooks, attributes, a patched forward."""
    tensors = [name for name, value in own_attributes(weight).items() if isinstance(value, Tensor)]
    if tensors:
        return Refusal(
            f"its weight has tensors of its own, which a core cannot take: {', '.join(tensors)}", warn=True
        )
    if gradient_hooks(weight):
        return Refusal("its weight has a gradient hook, which would not be called for a core", warn=True)
    taken = taken_names(holder)
    if taken:
        return Refusal(
            f"it has attributes of its own that a low-rank layer needs: {', '.join(taken)}", warn=True
        )
    forward = type(holder).forward
    if str(getattr(forward, "__module__", "")).partition(".")[0] not in FORWARDS:
        return Refusal(f"the forward of {type(holder).__name__} was replaced for all its layers", warn=True)
    if "forward" in holder.__dict__:
        return Refusal("its forward was replaced on this object", warn=True)
    return None


def taken_names(layer: nn.Module) -> list[str]:
    """Attributes of a dense layer that would get lost in its low-rank form, or get in its way."""
    own = {*layer.__dict__, *layer._parameters, *layer._buffers, *layer._modules}
    return sorted((own & _reserved_names()) - set(getattr(layer, "low_rank_attributes", ())))


def _reserved_names() -> frozenset[str]:
    classes, names = [LowRankWeight], set(LowRankWeight.__annotations__)
    while classes:
        each = classes.pop()
        classes += each.__subclasses__()
        names |= vars(each).keys()
    # A dense layer has its bias and its forward too; the latter is looked at on its own.
    return frozenset(name for name in names - {"bias", "forward", "weight"} if not name.startswith("__"))


def shared_memory(model: nn.Module) -> dict[int, str]:
    """For each parameter (by id) that shares memory with another parameter or a buffer, the other's name.

    Parameters that are one object are tied in another way, and not meant here.
    """
    spans: list[tuple[int, int, int, str]] = []
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        span = _span(tensor)
        if span is not None:
            spans.append((*span, id(tensor), name))
    spans.sort(key=lambda each: each[:2])
    found: dict[int, str] = {}
    furthest: tuple[int, int, int, str] | None = None
    for each in spans:
        start, end, key, name = each
        if furthest is not None and start < furthest[1]:
            found.setdefault(key, furthest[3])
            found.setdefault(furthest[2], name)
        if furthest is None or end > furthest[1]:
            furthest = each
    return found


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """First and last address of a tensor's numbers, where it has such."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout is not torch.strided:
        return None
    if tensor.numel() == 0:
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def bare_matrices(module: nn.Module, known: set[int]) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters with two axes or more, without those in ``known`` (by id)."""
    for name, parameter in module._parameters.items():
        if parameter is None or id(parameter) in known:
            continue
        if isinstance(parameter, UninitializedParameter):
            if name.startswith("weight"):
                yield name, parameter
        elif sum(size > 1 for size in whole_shape(parameter)) > 1:
            yield name, parameter
