"""``layer.weight`` of a low-rank layer: built from the factors at each access, and a write into it is an error."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hpc_oialr.errors import ModelError

if TYPE_CHECKING:
    from hpc_oialr.lowrank.base import LowRankWeight

_COPIES = {"__deepcopy__", "__reduce_ex__", "__repr__"}
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook"}


class BuiltWeight(Tensor):
    """``U S Vh`` as a tensor, and its views; what is computed from it is an ordinary tensor."""

    _layer: weakref.ref[LowRankWeight]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func``; raise :class:`ModelError` if it has written, which the version of a tensor tells."""
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            name = func.__name__
            if name in _COPIES:
                first = args[0].as_subclass(Tensor) if isinstance(args[0], BuiltWeight) else args[0]
                return func(first, *args[1:], **kwargs)
            if name in _HOOKS:
                raise _no_parameter(f"{name} of its weight")
            if name == "__set__" or name == "requires_grad_":
                return _set(func, args, kwargs)
            given = list(_built([args, kwargs]))
            versions = [tensor._version for tensor in given]
            result = func(*args, **kwargs)
            for tensor, version in zip(given, versions, strict=True):
                if tensor._version != version:
                    raise _refused_write(tensor)
            return _follow(result, given)

    def set_(self, *_: Any, **__: Any) -> Tensor:
        """Refused here, as ``__torch_function__`` is not called for it."""
        raise _refused_write(self)


class BuiltShards(DTensor):
    """The same for a layer whose factors are sharded."""

    __slots__ = ()
    _layer: weakref.ref[LowRankWeight]

    __torch_function__ = BuiltWeight.__dict__["__torch_function__"]

    def to_local(self, **options: Any) -> Tensor:
        """This rank's part, whose writes are refused too."""
        part: Tensor = _follow(super().to_local(**options), [self])
        return part


def read_only(weight: Tensor, layer: weakref.ref[LowRankWeight]) -> Tensor:
    """``weight`` of ``layer`` as one that refuses writes."""
    if isinstance(weight, DTensor):
        weight.__class__ = BuiltShards
        vars(weight)["_layer"] = layer
        return weight
    built = weight.as_subclass(BuiltWeight)
    built._layer = layer
    return built


def refuse_assignment(layer: LowRankWeight) -> ModelError:
    """The error for ``layer.weight = ...``."""
    return ModelError(
        f"{layer} has no weight to assign to: it is built from U, S and Vh. Change layer.S, or turn the layer back by "
        "hpc_oialr.merge(model, inplace=True) first; in torch.func.functional_call give S."
    )


def _refused_write(weight: BuiltWeight | BuiltShards) -> ModelError:
    return ModelError(
        f"the weight of {weight._layer()} was written in place, but it is built from U, S and Vh at each access, so that "
        "the write would be lost. Clip, constrain or initialise layer.S instead; or leave the layer out by "
        "oialr.selection.exclude; or edit the dense model that hpc_oialr.merge(model) gives."
    )


def _no_parameter(what: str) -> ModelError:
    return ModelError(
        f"{what} has no effect in a low-rank layer: its weight is built from U, S and Vh at each access, and only the "
        "core S is trained. Use layer.S."
    )


def _set(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Assignment to an attribute of a built weight, or ``requires_grad_``."""
    target = args[0]
    assert isinstance(target, (BuiltWeight, BuiltShards))
    attribute = "requires_grad" if func.__name__ == "requires_grad_" else func.__self__.__name__
    value = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
    if attribute == "requires_grad":
        layer = target._layer()
        if layer is not None:
            layer.S.requires_grad_(value)
        return target
    if attribute == "grad" and value is not None:
        raise _no_parameter("a gradient of its weight")
    if attribute == "data":
        raise _refused_write(target)
    return func(*args, **kwargs)


def _built(given: Any) -> Iterator[BuiltWeight | BuiltShards]:
    """The built weights among arguments, also those in lists."""
    if isinstance(given, (BuiltWeight, BuiltShards)):
        yield given
    elif isinstance(given, (list, tuple, dict)):
        for each in given.values() if isinstance(given, dict) else given:
            yield from _built(each)


def _follow(result: Any, given: Sequence[BuiltWeight | BuiltShards]) -> Any:
    """Make those of the results read-only that share memory with a built weight."""
    if isinstance(result, (BuiltWeight, BuiltShards)):
        return result
    if isinstance(result, Tensor):
        source = next((weight for weight in given if _shares(result, weight)), None)
        return result if source is None else read_only(result, source._layer)
    if isinstance(result, np.ndarray):
        result.flags.writeable = not given
    elif type(result) in (list, tuple):
        return type(result)(_follow(each, given) for each in result)
    return result


def _shares(a: Tensor, b: Tensor) -> bool:
    a, b = (x._local_tensor if isinstance(x, DTensor) else x for x in (a, b))
    if a.layout is not torch.strided or a.device != b.device or a.is_meta:
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
