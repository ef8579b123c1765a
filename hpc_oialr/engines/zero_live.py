"""What one of DeepSpeed's engines holds, from its making to the next change of r, and how layers change in it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_oialr.distributed import World
from hpc_oialr.engines.zero_partitions import MASTER, Part, Partitions, frozen_part
from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank.base import LowRankWeight, whole_shape


class LiveZero:
    """What DeepSpeed's ``engine``, with ZeRO 1, 2 or 3, holds of a module whose parameters are in ``dtype``."""

    def __init__(self, engine: Any, module: nn.Module, world: World, dtype: torch.dtype) -> None:
        self.engine, self.zero = engine, engine.optimizer
        self.partitions = Partitions(self.zero, world)
        self.dealt = self.partitions.fixed
        self.new: dict[nn.Parameter, Part] = {}  # of parameters that the module has got since
        self._module, self._world, self._dtype = module, world, dtype
        self._opened: dict[nn.Parameter, Tensor] = {}
        self._left: list[nn.Parameter] = []

    # -- looking ---------------------------------------------------------------------------------

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """A parameter in fp32; a collective call."""
        if parameter in self.partitions.places:
            return self.partitions.part(parameter).whole(MASTER, whole_shape(parameter), self._world)
        if not self.dealt:
            return parameter.detach().float()
        _let_go(parameter)
        return frozen_part(parameter, self._world).whole(MASTER, whole_shape(parameter), self._world)

    def moments(self, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
        """A parameter's moments, whole, one after another; a collective call."""
        part = self.partitions.part(parameter)
        for key in part.values:
            if key != MASTER:
                yield key, part.whole(key, whole_shape(parameter), self._world)

    def scalars(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The rest of a parameter's state."""
        return copy.deepcopy(self.partitions.part(parameter).scalars)

    def extra_tensors(self) -> Iterator[Tensor]:
        """What the module does not show: fp32 values, moments, ZeRO-3's parts and buffers."""
        for place in self.partitions.places.values():
            yield place.flat
            yield from (v for v in self.partitions.inner.state[place.flat].values() if isinstance(v, Tensor))
        if self.dealt:
            yield from (p.ds_tensor for p in self._module.parameters())  # type: ignore[attr-defined]
            yield self.zero.grad_partitions_flat_buffer
            yield from (b.buffer for b in self.zero.ipg_buckets.values() if b.buffer is not None)

    # -- a change of layers ----------------------------------------------------------------------

    def gather(self, parameter: nn.Parameter) -> None:
        """Show a parameter's whole values in it, trained ones in fp32; a collective call."""
        trained = parameter in self.partitions.places
        exact = not trained or self._dtype == torch.float32
        if parameter in self._opened or (exact and not self.dealt):
            return
        if self.dealt:
            _let_go(parameter)
        self._opened[parameter] = parameter.data
        parameter.data = self.whole(parameter)

    def release(self, parameter: nn.Parameter) -> None:
        """Free what :meth:`gather` brought, if it did."""
        if parameter in self._opened:
            parameter.data = self._opened.pop(parameter)

    def on_replace(self, layer: LowRankWeight, optimizer: Optimizer) -> None:
        """Put a layer's new values where DeepSpeed has them; shard its new parameters, free those that are gone."""
        donor = next(iter(self._opened), None)
        for parameter in layer.factors:
            known = parameter in self.partitions.places
            if known or parameter in self._opened:
                self._put_back(parameter, optimizer.state.pop(parameter, {}))
            elif parameter.requires_grad:
                self.new[parameter] = taken(parameter, optimizer, self._world)
                self._adopt(parameter, donor)
            elif parameter.dtype != self._dtype or (self.dealt and not hasattr(parameter, "ds_id")):
                self._adopt(parameter, donor)
        here = set(self._module.parameters())
        for parameter in [p for p in self._opened if p not in here]:
            self.release(parameter)
            self._left.append(parameter)

    def _put_back(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        values, place = parameter.data, self._opened.pop(parameter, parameter.data)
        if parameter in self.partitions.places:
            self.partitions.write(parameter, values_and_moments(parameter, state))
        if self.dealt:
            part = frozen_part(parameter, self._world)
            mine = part.values[MASTER]
            mine.copy_(values.reshape(-1)[part.start : part.start + mine.numel()])
        elif place is not values:
            place.copy_(values)
        parameter.data = place

    def _adopt(self, parameter: nn.Parameter, donor: nn.Parameter | None) -> None:
        if parameter.dtype not in (torch.float32, self._dtype):
            raise ModelError(
                f"oialr.factor_dtype is {str(parameter.dtype).removeprefix('torch.')}; DeepSpeed wants all parameters in "
                f"one dtype, which is {str(self._dtype).removeprefix('torch.')} here. Leave it null."
            )
        parameter.data = parameter.data.to(self._dtype)
        if self.dealt:
            assert donor is not None
            donor.convert_to_zero_parameters(param_list=[parameter])  # type: ignore[attr-defined]

    # -- the end ---------------------------------------------------------------------------------

    def parts(self, trained: Iterable[nn.Parameter]) -> dict[nn.Parameter, Part]:
        """This rank's part of every parameter, in host memory."""
        return {p: self.new.pop(p) if p in self.new else self.partitions.part(p).kept() for p in trained}

    def end(self) -> None:
        """Take DeepSpeed's engine off the module, with everything that would keep its memory."""
        here = set(self._module.parameters())
        gone = [p for p in {**self.partitions.places, **dict.fromkeys(self._left)} if p not in here]
        self.engine.destroy()
        self.engine.module_forward_pre_hook.remove()
        self.engine.module_forward_post_hook.remove()
        for module in self._module.modules():
            # ZeRO-3 makes these once in a module's life, and they hold on to that life's parameters.
            for name in ("pre_bwd_fn", "post_bwd_fn", "_external_params", "_original_parameters"):
                module.__dict__.pop(name, None)
        # Autograd's nodes of parameters refer to hooks, and those to all this, where no collector sees it.
        for owner in (self.engine, self.zero, *gone, self):
            vars(owner).clear()
        gc.collect()


def taken(parameter: nn.Parameter, optimizer: Optimizer, world: World) -> Part:
    """This rank's part of an ordinary parameter and of its state, which leaves the optimizer."""
    state = optimizer.state.pop(parameter, {})
    tensors = values_and_moments(parameter, state)
    return Part.own(tensors, {key: value for key, value in state.items() if key not in tensors}, world)


def values_and_moments(parameter: nn.Parameter, state: dict[str, Any]) -> dict[str, Tensor]:
    """A parameter's values, and the state of its shape."""
    moments = {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and key != "step"
    }
    return {MASTER: parameter.data, **moments}


def _let_go(parameter: Any) -> None:
    """Free the whole values that ZeRO-3 keeps of small parameters between uses."""
    if parameter.ds_status.name == "AVAILABLE":
        parameter.partition()
