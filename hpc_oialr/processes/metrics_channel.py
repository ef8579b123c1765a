"""The largest of all processes' vectors, slot by slot, found beside the training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_oialr.processes.world import Pending, World


class PendingReduction(ABC):
    """A reduction under way."""

    @abstractmethod
    def result(self) -> Tensor:
        """Wait for the largest values; float64, on the CPU, of the shape of what was sent.

        Raises
        ------
        WorldError
            If another process has died or does not answer within the timeout.
        """


class MetricsChannel(ABC):
    """Finds the largest value of each slot of a vector over all processes, while other work goes on.

    The same bits over every channel, since no order of comparing changes the largest, if no slot is NaN
    and none -0.0; :class:`~hpc_oialr.processes.metrics_layout.MetricsLayout` makes such vectors.

    Attributes
    ----------
    name
        "mpi", or the name of torch's backend, or "single".
    """

    name: str

    @abstractmethod
    def start(self, vector: Tensor) -> PendingReduction:
        """Begin one all-reduce of ``vector``, of shape (slots,), float64, on the CPU.

        A collective call that returns at once; each process sends at most ``16 slots`` bytes in a ring,
        ``8 slots log2 P`` in a tree. ``vector`` is copied.
        """

    def close(self) -> None:
        """Let go of the channel after a run that went well; never needed after an error."""
        return


class TorchChannel(MetricsChannel):
    """Over the World's own process group; alone, over nothing.

    Parameters
    ----------
    world
        The processes. Their CPU backend is used; a group that has none, NCCL alone, sends through the
        GPU.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.device = _sending_device(world)
        self.name = "single" if world.size == 1 else str(dist.get_backend(world.group))

    def start(self, vector: Tensor) -> PendingReduction:
        """``all_reduce(async_op=True)``."""
        values = vector.to(self.device, torch.float64, copy=True)
        return _TorchReduction(values, self.world.start_all_reduce(values, op="max"))


@dataclass(frozen=True)
class _TorchReduction(PendingReduction):
    values: Tensor
    pending: Pending | None

    def result(self) -> Tensor:
        if self.pending is not None:
            self.pending.wait()
        return self.values.cpu()


def _sending_device(world: World) -> torch.device:
    if world.size == 1 or "cpu:" in dist.get_backend_config(world.group):
        return torch.device("cpu")
    return world.device
