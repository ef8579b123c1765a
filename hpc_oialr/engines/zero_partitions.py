"""This process's part of every trained parameter under ZeRO: fp32 values, moments, their way through a rebuild.

The only file that knows where DeepSpeed keeps them (as of 0.19).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hpc_oialr.distributed import World
from hpc_oialr.lowrank.base import whole_shape

MASTER = "master"


@dataclass(frozen=True)
class Place:
    """``numel`` values of a parameter, from its ``start`` on, are at ``offset`` of this process's ``flat``."""

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
        """This process's part of whole tensors, as ZeRO-3 deals them; a copy in host memory."""
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
        """All processes' parts together; one all-reduce of the tensor's size."""
        total = torch.zeros(shape.numel(), dtype=torch.float32, device=world.device)
        part = self.values[key]
        total[self.start : self.start + part.numel()] = part.to(total.device)
        return world.all_reduce(total).view(shape)


class Partitions:
    """What one live ZeRO optimizer holds on this process.

    Parameters
    ----------
    zero
        DeepSpeed's optimizer of stage 1, 2 or 3.
    world
        The processes.
    """

    def __init__(self, zero: Any, world: World) -> None:
        self.inner: torch.optim.Optimizer = zero.optimizer
        self.world = world
        # Stage 3 deals each parameter on its own, so that its parts do not move when others change.
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
        """Take this process's part of whole tensors."""
        for key, target in self.part(parameter).values.items():
            self._take(target, tensors[key].reshape(-1), self.places[parameter])

    def restore(self, parts: dict[nn.Parameter, Part]) -> None:
        """Take over values, moments and counters of all parameters; ``parts`` is emptied on the way.

        Stage 3 sends nothing. Stages 1 and 2 move the boundaries between processes: one all-reduce of each
        tensor, one after another.
        """
        for flat, members in self._members():
            example = parts[members[0]]
            for key in example.values:
                if key != MASTER:
                    self.inner.state[flat][key] = torch.zeros_like(flat, requires_grad=False)
            self.inner.state[flat].update(copy.deepcopy(example.scalars))
            for parameter in members:
                self._restore(parameter, parts.pop(parameter))

    def _restore(self, parameter: nn.Parameter, stored: Part) -> None:
        place = self.places[parameter]
        for key, target in self.part(parameter).values.items():
            if self.fixed:
                target.copy_(stored.values[key])
            else:
                self._take(target, stored.whole(key, whole_shape(parameter), self.world).view(-1), place)

    def _members(self) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
        members: dict[int, tuple[Tensor, list[nn.Parameter]]] = {}
        for parameter, place in self.places.items():
            members.setdefault(id(place.flat), (place.flat, []))[1].append(parameter)
        yield from members.values()

    @staticmethod
    def _take(target: Tensor, whole: Tensor, place: Place) -> None:
        target.copy_(whole[place.start : place.start + place.numel])


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
    """Stages 1 and 2: a group's parameters in a row, cut into equal pieces, one a process."""
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in group:
            found = parameter._hp_mapping
            if found is None:
                yield parameter, Place(flat, 0, 0, 0)
            else:
                here, there = found.hp_fragment_address, found.lp_fragment_address
                yield parameter, Place(flat, here.start, there.start, here.numel)


def _by_parameter(zero: Any, world: World) -> Iterator[tuple[nn.Parameter, Place]]:
    """Stage 3: each parameter cut into equal pieces, the last ones padded; a process's pieces in a row."""
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
