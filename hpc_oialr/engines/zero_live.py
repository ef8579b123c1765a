"""The values and moments in one of DeepSpeed's engines, until the next change of r, and how layers change in it.

The only file that knows where DeepSpeed stores fp32 values and moments (as of 0.19).
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_oialr.distributed import World
from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank.base import LowRankWeight, whole_shape

MASTER = "master"


@dataclass
class Part:
    """This rank's consecutive values of one parameter, from ``start`` on."""

    start: int
    values: dict[str, Tensor]  # MASTER: the parameter in fp32, the optimizer's keys: its moments; all flat
    scalars: dict[str, Any] = field(default_factory=dict)  # state of another shape: step counters

    @classmethod
    def taken(cls, parameter: nn.Parameter, optimizer: Optimizer, world: World) -> Part:
        """Shard an ordinary parameter and its state, removed from the optimizer, as ZeRO-3 does; in host memory."""
        state = optimizer.state.pop(parameter, {})
        tensors = _values_and_moments(parameter, state)
        length = -(-parameter.numel() // world.size)
        start = min(parameter.numel(), world.rank * length)
        values = {
            key: tensor.detach().reshape(-1)[start : start + length].to("cpu", torch.float32, copy=True)
            for key, tensor in tensors.items()
        }
        return cls(start, values, {key: value for key, value in state.items() if key not in tensors})

    @classmethod
    def frozen(cls, parameter: Any, world: World) -> Part:
        """Views of stage 3's shard of any parameter, in the module's dtype."""
        numel, length = whole_shape(parameter).numel(), parameter.partition_numel()
        start = min(numel, world.rank * length)
        return cls(start, {MASTER: parameter.ds_tensor.detach().narrow(0, 0, min(length, numel - start))})

    def kept(self) -> Part:
        """A copy in host memory."""
        values = {key: value.to("cpu", copy=True) for key, value in self.values.items()}
        return Part(self.start, values, copy.deepcopy(self.scalars))

    def whole(self, key: str, parameter: nn.Parameter, world: World) -> Tensor:
        """All ranks' parts, in the parameter's shape; one all-reduce of its size."""
        shape, part = whole_shape(parameter), self.values[key]
        total = torch.zeros(shape.numel(), dtype=torch.float32, device=world.device)
        total[self.start : self.start + part.numel()] = part.to(total.device)
        return world.all_reduce(total).view(shape)


class _Place(NamedTuple):
    """``numel`` values of a parameter, from its ``start`` on, are at ``offset`` in this rank's ``flat``."""

    flat: Tensor
    offset: int
    start: int
    numel: int


class LiveZero:
    """DeepSpeed's ``engine``, with ZeRO 1, 2 or 3, of a module whose parameters are in ``dtype``."""

    def __init__(self, engine: Any, module: nn.Module, world: World, dtype: torch.dtype) -> None:
        self.engine, self.zero = engine, engine.optimizer
        self.inner: Optimizer = self.zero.optimizer
        self.new: dict[nn.Parameter, Part] = {}  # of parameters that are new in the module
        self._module, self._world, self._dtype = module, world, dtype
        self._opened: dict[nn.Parameter, Tensor] = {}
        self._left: list[nn.Parameter] = []
        # Stage 3 shards each parameter on its own, so that its parts do not move when others change.
        self.sharded = hasattr(self.zero, "fp32_partitioned_groups_flat")
        if self.sharded:
            _share_masters(self.zero)
        self._places = dict(_by_parameter(self.zero, world) if self.sharded else _by_group(self.zero))

    def part(self, parameter: nn.Parameter) -> Part:
        """Views of this rank's part of a trained parameter."""
        flat, offset, start, numel = self._places[parameter]
        state = self.inner.state.get(flat, {})
        moments = {
            key: value
            for key, value in state.items()
            if isinstance(value, Tensor) and value.dim() == 1 and value.shape == flat.shape
        }
        tensors = {MASTER: flat} | moments
        values = {key: value.detach().narrow(0, offset, numel) for key, value in tensors.items()}
        return Part(start, values, {key: value for key, value in state.items() if key not in moments})

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """A parameter in fp32; a collective call."""
        if parameter in self._places:
            return self.part(parameter).whole(MASTER, parameter, self._world)
        if not self.sharded:
            return parameter.detach().float()
        _free_whole(parameter)
        return Part.frozen(parameter, self._world).whole(MASTER, parameter, self._world)

    def state(
        self, parameter: nn.Parameter, stored: Callable[[Tensor], Tensor] = lambda moment: moment
    ) -> dict[str, Any]:
        """A parameter's state, each moment gathered whole and passed through ``stored`` in turn; a collective call."""
        part = self.part(parameter)
        moments = (key for key in part.values if key != MASTER)
        gathered = {key: stored(part.whole(key, parameter, self._world)) for key in moments}
        return gathered | copy.deepcopy(part.scalars)

    def extra_tensors(self) -> Iterator[Tensor]:
        """Tensors that are not in the module: fp32 values, moments, ZeRO-3's shards and buffers."""
        for place in self._places.values():
            yield place.flat
            yield from (v for v in self.inner.state[place.flat].values() if isinstance(v, Tensor))
        if self.sharded:
            yield from (p.ds_tensor for p in self._module.parameters())  # type: ignore[attr-defined]
            yield self.zero.grad_partitions_flat_buffer
            yield from (b.buffer for b in self.zero.ipg_buckets.values() if b.buffer is not None)

    def parts(self, trained: Iterable[nn.Parameter]) -> dict[nn.Parameter, Part]:
        """This rank's part of every parameter, in host memory."""
        return {p: self.new.pop(p) if p in self.new else self.part(p).kept() for p in trained}

    def restore(self, parts: dict[nn.Parameter, Part]) -> None:
        """Copy in values, moments and counters of all parameters; empties ``parts``.

        Stage 3 sends nothing. In stages 1 and 2 the boundaries between ranks move: one all-reduce per tensor in turn.
        """
        members: dict[int, list[nn.Parameter]] = {}
        for parameter, place in self._places.items():
            members.setdefault(id(place.flat), []).append(parameter)
        for parameters in members.values():
            flat, example = self._places[parameters[0]].flat, parts[parameters[0]]
            for key in example.values:
                if key != MASTER:
                    self.inner.state[flat][key] = torch.zeros_like(flat, requires_grad=False)
            self.inner.state[flat].update(copy.deepcopy(example.scalars))
            for parameter in parameters:
                stored = parts.pop(parameter)
                for key, mine in self.part(parameter).values.items():
                    if self.sharded:
                        mine.copy_(stored.values[key])
                    else:
                        self._take(mine, stored.whole(key, parameter, self._world), parameter)

    def _take(self, mine: Tensor, whole: Tensor, parameter: nn.Parameter) -> None:
        place = self._places[parameter]
        mine.copy_(whole.reshape(-1)[place.start : place.start + place.numel])

    def stretch_steps(self, factors: Mapping[nn.Parameter, float]) -> None:
        """Multiply parameters' steps, weight decay included, as :class:`~hpc_oialr.optim.core_lr.CoreLearningRate`."""
        parts = [
            (self.part(p).values[MASTER], factors[p])
            for p, place in self._places.items()
            if factors.get(p, 1.0) != 1.0 and place.numel
        ]
        before: list[Tensor] = []

        @torch.no_grad()
        def remember(*_: Any) -> None:
            before[:] = [values.clone() for values, _ in parts]

        @torch.no_grad()
        def stretch(*_: Any) -> None:
            # ZeRO steps one flat piece after another: all values of the others stay.
            for (values, factor), old in zip(parts, before, strict=True):
                values.add_((values - old).mul_(factor - 1.0))
            before.clear()

        if parts:
            self.inner.register_step_pre_hook(remember)
            self.inner.register_step_post_hook(stretch)

    def end(self) -> None:
        """Remove DeepSpeed's engine from the module, with every reference that would keep its memory."""
        here = set(self._module.parameters())
        gone = [p for p in {**self._places, **dict.fromkeys(self._left)} if p not in here]
        self.engine.destroy()
        self.engine.module_forward_pre_hook.remove()
        self.engine.module_forward_post_hook.remove()
        for module in self._module.modules():
            # ZeRO-3 makes these once per module, with references to the old parameters.
            for name in ("pre_bwd_fn", "post_bwd_fn", "_external_params", "_original_parameters"):
                module.__dict__.pop(name, None)
        # Parameters' autograd nodes refer to hooks, and those to all this, invisible to the garbage collector.
        for owner in (self.engine, self.zero, *gone, self):
            vars(owner).clear()
        gc.collect()

    def gather(self, parameter: nn.Parameter) -> None:
        """Put a parameter's whole values into it, trained ones in fp32; a collective call."""
        exact = parameter not in self._places or self._dtype == torch.float32
        if parameter in self._opened or (exact and not self.sharded):
            return
        if self.sharded:
            _free_whole(parameter)
        self._opened[parameter] = parameter.data
        parameter.data = self.whole(parameter)

    def release(self, parameter: nn.Parameter) -> None:
        """Free what :meth:`gather` gathered, if anything."""
        if parameter in self._opened:
            parameter.data = self._opened.pop(parameter)

    def on_replace(self, layer: LowRankWeight, optimizer: Optimizer) -> None:
        """Copy a layer's new values into DeepSpeed's storage, shard new parameters, free old ones."""
        donor = next(iter(self._opened), None)
        for parameter in layer.factors:
            if parameter in self._places or parameter in self._opened:
                self._put_back(parameter, optimizer.state.pop(parameter, {}))
            elif parameter.requires_grad:
                self.new[parameter] = Part.taken(parameter, optimizer, self._world)
                self._adopt(parameter, donor)
            elif parameter.dtype != self._dtype or (self.sharded and not hasattr(parameter, "ds_id")):
                self._adopt(parameter, donor)
        here = set(self._module.parameters())
        for parameter in [p for p in self._opened if p not in here]:
            self.release(parameter)
            self._left.append(parameter)

    def _put_back(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        values, place = parameter.data, self._opened.pop(parameter, parameter.data)
        if parameter in self._places:
            tensors = _values_and_moments(parameter, state)
            for key, mine in self.part(parameter).values.items():
                self._take(mine, tensors[key], parameter)
        if self.sharded:
            part = Part.frozen(parameter, self._world)
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
        if self.sharded:
            assert donor is not None
            donor.convert_to_zero_parameters(param_list=[parameter])  # type: ignore[attr-defined]


def _values_and_moments(parameter: nn.Parameter, state: dict[str, Any]) -> dict[str, Tensor]:
    """A parameter's values, and the state of its shape."""
    moments = {
        key: value
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and key != "step"
    }
    return {MASTER: parameter.data, **moments}


def _free_whole(parameter: Any) -> None:
    """Free whole values of small parameters, which ZeRO-3 keeps gathered between uses."""
    if parameter.ds_status.name == "AVAILABLE":
        parameter.partition()


def _share_masters(zero: Any) -> None:
    """In fp32 let stage 3's fp32 values share memory with the parameters' shards, as DeepSpeed intends.

    Its ``_create_fp32_partitions`` copies unless the shards are on its device, but compares the device with its name
    (0.19.8), which is never equal.
    """
    for master, parts in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
        if master.dtype == parts.dtype:
            master.data = parts.detach()


def _by_group(zero: Any) -> Iterator[tuple[nn.Parameter, _Place]]:
    """Stages 1 and 2: a group's parameters in a row, in equal pieces, one per rank."""
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            found = parameter._hp_mapping
            if found is None:
                yield parameter, _Place(flat, 0, 0, 0)
            else:
                here, there = found.hp_fragment_address, found.lp_fragment_address
                yield parameter, _Place(flat, here.start, there.start, here.numel)


def _by_parameter(zero: Any, world: World) -> Iterator[tuple[nn.Parameter, _Place]]:
    """Stage 3: each parameter in equal pieces, the last ones padded; a rank's pieces in a row."""
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            length, numel = parameter.partition_numel(), whole_shape(parameter).numel()
            start = min(numel, world.rank * length)
            yield parameter, _Place(flat, offset, start, min(length, numel - start))
            offset += length
