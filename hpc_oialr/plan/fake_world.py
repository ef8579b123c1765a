"""One process of a large world whose other processes do not exist: torch's fake process group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_oialr import torch_compat
from hpc_oialr.errors import WorldError
from hpc_oialr.processes import World
from hpc_oialr.processes.world import Op, Pending


class FakeWorld(World):
    """The world of a process whose messages nobody answers.

    What another process would have sent is zero; values that are equal on all processes from the start stay.
    """

    def broadcast(self, tensor: Tensor, src: int) -> Pending | None:
        """As :class:`World`'s; zeros from others."""
        if src != self.rank:
            tensor.zero_()
        return super().broadcast(tensor, src)

    def start_all_reduce(self, tensor: Tensor, op: Op = "sum") -> Pending | None:
        """As :class:`World`'s; the others' part of a maximum is 0."""
        pending = super().start_all_reduce(tensor, op)
        if op == "max":
            tensor.clamp_(min=0)
        return pending

    def share(self, tensors: Any, src: int = 0) -> None:
        """As :class:`World`'s, without a change of values."""
        for tensor in tensors:
            super().broadcast(tensor, src)


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[World]:
    """A world of ``size`` processes, of which only ``rank`` exists; on the CPU.

    Raises
    ------
    WorldError
        If there is a process group already.
    """
    if size == 1:
        yield World(device=torch.device("cpu"))
        return
    if dist.is_initialized():
        raise WorldError(
            f"a process group of {dist.get_world_size()} processes exists, and a plan makes a fake one. Start oialr "
            "plan as one process, without torchrun, srun or mpirun."
        )
    # The import of FakeStore registers the backend "fake".
    dist.init_process_group("fake", rank=rank, world_size=size, store=torch_compat.FakeStore())
    try:
        yield FakeWorld(rank, size, 0, 1, torch.device("cpu"), "adopted", dist.group.WORLD, timeout_s=60.0)
    finally:
        dist.destroy_process_group()
        # DTensor caches operations with the groups of this world.
        torch_compat.forget_groups()
