"""Base of the engines of several ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hpc_oialr.distributed import World
from hpc_oialr.distributed.replicas import check_equal
from hpc_oialr.method.engine import Engine


class GroupEngine(Engine):
    """An engine of a process group; ``world`` are all ranks."""

    world: World

    def send_initial(self, module: nn.Module) -> None:
        """Send rank 0's parameters and buffers to all ranks, before anything is sharded."""
        self.world.share(tensor.data for tensor in [*module.parameters(), *module.buffers()])

    def check_replicas(self, named: Mapping[str, Sequence[Tensor]]) -> None:
        """One all-reduce of 16 bytes a name."""
        check_equal(named, self.replicas)
