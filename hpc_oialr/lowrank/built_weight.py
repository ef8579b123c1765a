"""``layer.weight`` of a low-rank layer: built from the factors, and what is written into it reaches them."""

from __future__ import annotations

import contextlib
import inspect
import traceback
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hpc_oialr.errors import ModelError
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.svd import compute_dtype

if TYPE_CHECKING:
    from hpc_oialr.lowrank.base import LowRankWeight

_COPIES = {"__deepcopy__", "__reduce_ex__", "__repr__"}
_HOOKS = {"register_hook", "register_post_accumulate_grad_hook"}


@dataclass
class Written:
    """A weight that a user has written and that the frozen bases cannot express.

    Attributes
    ----------
    values
        The weight as it was left, m x n with any number of axes.
    lost
        Share of its norm outside the bases.
    place
        File and line of the last write.
    """

    values: Tensor
    lost: float
    place: str

    def error(self, layer: LowRankWeight) -> ModelError:
        """For a use of ``layer``."""
        share = (
            f"{100 * self.lost:.2g}% of it lies" if self.lost == self.lost else "it is not finite, or lies"
        )
        return ModelError(
            f"the weight of {layer} was written in place ({self.place}), and {share} outside the frozen bases U and Vh, "
            "so that its core cannot hold it. Clip, constrain or initialise layer.S instead; or leave the layer out by "
            "oialr.selection.exclude; or edit the dense model that hpc_oialr.merge(model) gives."
        )


class BuiltWeight(Tensor):
    """``U S Vh`` as a tensor, and its views; an in-place operation on any of them is an operation on the layer.

    What is computed from it is an ordinary tensor.
    """

    _source: _Source

    @classmethod
    def of(cls, layer: LowRankWeight, weight: Tensor) -> Tensor:
        """``weight``, just built from the factors of ``layer`` or written by the user."""
        return _tracked(weight, _Source(weakref.ref(layer), weight.detach(), _stamp(layer)))

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func``; if it writes, which the version of a tensor tells, hand the new values to the layer."""
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            name = func.__name__
            if name in _COPIES:
                return func(_plain(args[0]), *args[1:], **kwargs)
            if name in _HOOKS:
                raise _no_parameter(f"{name} of its weight")
            if name == "__set__" or name == "requires_grad_":
                return _set(func, args, kwargs)
            given = list(_built([args, kwargs]))
            versions = [tensor._version for tensor in given]
            result = func(*args, **kwargs)
            for tensor, version in zip(given, versions, strict=True):
                if tensor._version != version:
                    tensor._source.write(tensor if name == "set_" else None)
            return _follow(result, given)


class BuiltShards(DTensor):
    """The same for a layer whose factors are sharded: a write into it is refused."""

    __slots__ = ()
    _source: _Source

    __torch_function__ = BuiltWeight.__dict__["__torch_function__"]

    def to_local(self, **options: Any) -> Tensor:
        """This process's part, whose writes are refused too."""
        part: Tensor = _follow(super().to_local(**options), [self])
        return part


@dataclass
class _Source:
    """Where a built weight comes from: its layer, all its values, and the state of the factors at that time."""

    layer: weakref.ref[LowRankWeight]
    values: Tensor
    stamp: tuple[int, ...]

    @exact_arithmetic()
    def write(self, replacement: Tensor | None = None) -> None:
        """Make the values the layer's: in its core if the bases can express them, else to be refused when used.

        Costs ``2 m n r`` and two pseudo-inverses, of U and Vh.
        """
        layer = self.layer()
        if layer is None:
            return
        if self.stamp != _stamp(layer):
            raise ModelError(
                f"a weight of {layer} is written that was read before its factors changed; the write would undo that "
                "change. Read layer.weight anew each time."
            )
        if isinstance(layer.U, DTensor):
            raise ModelError(
                f"the weight of {layer} was written in place ({_place()}), which cannot reach its factors, as these are "
                "split over processes. Clip, constrain or initialise layer.S instead; or leave the layer out by "
                "oialr.selection.exclude."
            )
        if replacement is not None:
            self.values = _plain(replacement).detach()
        values = self.values
        if values.shape != layer.dense_shape:
            raise ModelError(
                f"a weight of shape {tuple(values.shape)} is written into {layer}, whose weight is "
                f"{tuple(layer.dense_shape)}; the shapes must be equal."
            )
        dtype = compute_dtype(layer.S.dtype)
        U, Vh = layer.U.detach().to(dtype), layer.Vh.detach().to(dtype)
        W = values.reshape(layer.m, layer.n).to(dtype)
        core = torch.linalg.pinv(U) @ W @ torch.linalg.pinv(Vh)
        norm = float(torch.linalg.matrix_norm(W))
        lost = float(torch.linalg.matrix_norm(W - U @ (core @ Vh))) / norm if norm > 0 else 0.0
        # Rounding of the products, and of the weight itself where its dtype is a shorter one.
        if lost <= 200 * torch.finfo(dtype).eps + 4 * torch.finfo(layer.S.dtype).eps:
            layer.S.detach().copy_(core)
            layer.written = None
        else:
            layer.written = Written(values.detach(), lost, _place())
        self.stamp = _stamp(layer)


def _stamp(layer: LowRankWeight) -> tuple[int, ...]:
    """Changes with every write to the factors."""
    versions = (0 if p.is_inference() else p._version for p in layer.factors)
    return (*map(id, layer.factors), *versions)


def _no_parameter(what: str) -> ModelError:
    return ModelError(
        f"{what} has no effect in a low-rank layer: its weight is built from U, S and Vh at each access, and only the "
        "core S is trained. Use layer.S."
    )


def refuse_assignment(layer: LowRankWeight) -> ModelError:
    """The error for ``layer.weight = ...``."""
    return ModelError(
        f"{layer} has no weight to assign to: it is built from U, S and Vh. Write values by layer.weight.copy_(...), or "
        "turn the layer back by hpc_oialr.merge(model, inplace=True) first; in torch.func.functional_call give S."
    )


def _set(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Assignment to an attribute of a built weight, or ``requires_grad_``."""
    target = args[0]
    assert isinstance(target, (BuiltWeight, BuiltShards))
    attribute = "requires_grad" if func.__name__ == "requires_grad_" else func.__self__.__name__
    value = args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
    if attribute == "requires_grad":
        layer = target._source.layer()
        if layer is not None:
            layer.S.requires_grad_(value)
        return target
    if attribute == "grad" and value is not None:
        raise _no_parameter("a gradient of its weight")
    result = func(*args, **kwargs)
    if attribute == "data":
        target._source.write(target)
    return result


def _built(given: Any) -> Iterator[BuiltWeight | BuiltShards]:
    """The built weights among arguments, also those in lists."""
    if isinstance(given, (BuiltWeight, BuiltShards)):
        yield given
    elif isinstance(given, (list, tuple, dict)):
        for each in given.values() if isinstance(given, dict) else given:
            yield from _built(each)


def _follow(result: Any, arguments: Iterable[BuiltWeight | BuiltShards]) -> Any:
    """Mark those of the results that share memory with a built weight."""
    if not arguments or isinstance(result, (BuiltWeight, BuiltShards)):
        return result
    if isinstance(result, Tensor):
        source = next((each._source for each in arguments if _shares(result, each._source.values)), None)
        return result if source is None else _tracked(result, source)
    if isinstance(result, np.ndarray):
        result.flags.writeable = False  # a write to it would be lost
    elif type(result) in (list, tuple):
        return type(result)(_follow(each, arguments) for each in result)
    return result


def _shares(a: Tensor, b: Tensor) -> bool:
    a, b = (x._local_tensor if isinstance(x, DTensor) else x for x in (a, b))
    if a.layout is not torch.strided or a.device != b.device or a.is_meta:
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _tracked(tensor: Tensor, source: _Source) -> Tensor:
    if isinstance(tensor, DTensor):
        tensor.__class__ = BuiltShards
        vars(tensor)["_source"] = source
        return tensor
    tracked = tensor.as_subclass(BuiltWeight)
    tracked._source = source
    return tracked


def _plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor) if isinstance(tensor, BuiltWeight) else tensor


def _place() -> str:
    """File and line of the caller, outside torch, this package and its decorators."""
    own = [Path(torch.__file__).parent, Path(__file__).parents[1], Path(contextlib.__file__)]
    for frame, line in traceback.walk_stack(inspect.currentframe()):
        file = Path(frame.f_code.co_filename)
        if not any(place in (file, *file.parents) for place in own):
            return f"{file}:{line}"
    return "at an unknown place"


def trackable(core: nn.Parameter) -> bool:
    """Whether writes to a weight with this core can be noticed."""
    return type(core) in (nn.Parameter, DTensor) and not core.is_meta
