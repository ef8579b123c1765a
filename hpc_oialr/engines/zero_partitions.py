"""This rank's part of every trained parameter under ZeRO: fp32 values, moments, their way through a rebuild.

The only file that knows where DeepSpeed keeps them (as of 0.19).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hpc_oialr.distributed import World
from hpc_oialr.lowrank.base import whole_shape

MASTER = "master"


@dataclass(frozen=True)
class Place:
    """``numel`` values of a parameter, from its ``start`` on, are at ``offset`` of this rank's ``flat``."""

    flat: Tensor
    offset: int
    start: int
    numel: int

    def view(self, flat: Tensor) -> Tensor:
        """The part of ``flat``, or of a moment of the same shape."""
        return flat.detach().narrow(0, self.offset, self.numel)


@dataclass
class Part:
    """Consecutive values of one parameter, from ``start`` on.

    Attributes
    ----------
    values
        Under ``MASTER`` the parameter in fp32, under the optimizer's keys its moments; one axis each.
    scalars
        State that is not of the parameter's shape: step counters.
    """

    start: int
    values: dict[str, Tensor]
    scalars: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def own(cls, tensors: dict[str, Tensor], scalars: dict[str, Any], world: World) -> Part:
        """This rank's part of whole tensors, as ZeRO-3 shards them; a copy in host memory."""
        numel = tensors[MASTER].numel()
        length = -(-numel // world.size)
        start = min(numel, world.rank * length)
        values = {
            key: tensor.detach().reshape(-1)[start : start + length].to("cpu", torch.float32, copy=True)
            for key, tensor in tensors.items()
        }
        return cls(start, values, scalars)

    def kept(self) -> Part:
        """A copy in host memory, to outlive the engine."""
        values = {key: value.to("cpu", copy=True) for key, value in self.values.items()}
        return Part(self.start, values, copy.deepcopy(self.scalars))

    def whole(self, key: str, shape: torch.Size, world: World) -> Tensor:
        """All ranks' parts together; one all-reduce of the tensor's size."""
        total = torch.zeros(shape.numel(), dtype=torch.float32, device=world.device)
        part = self.values[key]
        total[self.start : self.start + part.numel()] = part.to(total.device)
        return world.all_reduce(total).view(shape)


class Partitions:
    """What ``zero``, DeepSpeed's live optimizer of stage 1, 2 or 3, holds on this rank."""

    def __init__(self, zero: Any, world: World) -> None:
        self.inner: torch.optim.Optimizer = zero.optimizer
        self.world = world
        # Stage 3 shards each parameter on its own, so that its parts do not move when others change.
        self.fixed = hasattr(zero, "fp32_partitioned_groups_flat")
        if self.fixed:
            _share_masters(zero)
        self.places = dict(_by_parameter(zero, world) if self.fixed else _by_group(zero))

    def part(self, parameter: nn.Parameter) -> Part:
        """Views of what is here of ``parameter``."""
        place = self.places[parameter]
        state = self.inner.state.get(place.flat, {})
        moments = {key: value for key, value in state.items() if _is_like(value, place.flat)}
        values = {MASTER: place.view(place.flat)} | {key: place.view(value) for key, value in moments.items()}
        return Part(place.start, values, {key: v for key, v in state.items() if key not in moments})

    def write(self, parameter: nn.Parameter, tensors: dict[str, Tensor]) -> None:
        """Take this rank's part of whole tensors."""
        place = self.places[parameter]
        for key, mine in self.part(parameter).values.items():
            mine.copy_(tensors[key].reshape(-1)[place.start : place.start + place.numel])

    def restore(self, parts: dict[nn.Parameter, Part]) -> None:
        """Take over values, moments and counters of all parameters; ``parts`` is emptied on the way.

        Stage 3 sends nothing. Stages 1 and 2 move the boundaries between ranks: one all-reduce of each
        tensor, one after another.
        """
        members: dict[int, list[nn.Parameter]] = {}
        for parameter, place in self.places.items():
            members.setdefault(id(place.flat), []).append(parameter)
        for parameters in members.values():
            flat, example = self.places[parameters[0]].flat, parts[parameters[0]]
            for key in example.values:
                if key != MASTER:
                    self.inner.state[flat][key] = torch.zeros_like(flat, requires_grad=False)
            self.inner.state[flat].update(copy.deepcopy(example.scalars))
            for parameter in parameters:
                stored, place = parts.pop(parameter), self.places[parameter]
                for key, mine in self.part(parameter).values.items():
                    if self.fixed:
                        mine.copy_(stored.values[key])
                    else:
                        shape, part = whole_shape(parameter), slice(place.start, place.start + place.numel)
                        mine.copy_(stored.whole(key, shape, self.world).view(-1)[part])

    def stretch_steps(self, factors: Mapping[nn.Parameter, float]) -> None:
        """Do for this rank's part of each core what :class:`hpc_oialr.optim.core_lr.CoreLearningRate` does.

        ``factors`` multiply a parameter's step, weight decay included; 1 for the others.
        """
        parts: defaultdict[int, list[tuple[Tensor, float]]] = defaultdict(list)
        for parameter, place in self.places.items():
            factor = factors.get(parameter, 1.0)
            if factor != 1.0 and place.numel:
                parts[id(place.flat)].append((self.part(parameter).values[MASTER], factor))
        before: list[tuple[Tensor, Tensor, float]] = []

        @torch.no_grad()
        def remember(inner: torch.optim.Optimizer, *_: Any) -> None:
            # ZeRO steps one flat piece after another.
            stepped = [flat for group in inner.param_groups for flat in group["params"]]
            found = [part for flat in stepped for part in parts.get(id(flat), ())]
            before[:] = [(values, values.clone(), factor) for values, factor in found]

        @torch.no_grad()
        def stretch(*_: Any) -> None:
            for values, old, factor in before:
                values.add_((values - old).mul_(factor - 1.0))
            before.clear()

        if parts:
            self.inner.register_step_pre_hook(remember)
            self.inner.register_step_post_hook(stretch)


def _is_like(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and value.shape == flat.shape


def _share_masters(zero: Any) -> None:
    """In fp32 let stage 3's fp32 values be the parameters' parts themselves, as DeepSpeed means them to be.

    Its ``_create_fp32_partitions`` makes a copy unless the parts are on its device, but compares the device
    with its name (0.19.8), which is never equal. What it copies back after a step is then the same memory.
    """
    for master, parts in zip(
        zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True
    ):
        if master.dtype == parts.dtype:
            master.data = parts.detach()


def _by_group(zero: Any) -> Iterator[tuple[nn.Parameter, Place]]:
    """Stages 1 and 2: a group's parameters in a row, cut into equal pieces, one a rank."""
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            found = parameter._hp_mapping
            if found is None:
                yield parameter, Place(flat, 0, 0, 0)
            else:
                here, there = found.hp_fragment_address, found.lp_fragment_address
                yield parameter, Place(flat, here.start, there.start, here.numel)


def _by_parameter(zero: Any, world: World) -> Iterator[tuple[nn.Parameter, Place]]:
    """Stage 3: each parameter cut into equal pieces, the last ones padded; a rank's pieces in a row."""
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            length, numel = parameter.partition_numel(), whole_shape(parameter).numel()
            start = min(numel, world.rank * length)
            yield parameter, Place(flat, offset, start, min(length, numel - start))
            offset += length


def frozen_part(parameter: Any, world: World) -> Part:
    """Views of what stage 3 has here of any parameter, in the module's dtype."""
    numel, length = whole_shape(parameter).numel(), parameter.partition_numel()
    start = min(numel, world.rank * length)
    return Part(start, {MASTER: parameter.ds_tensor.detach().narrow(0, 0, min(length, numel - start))})
