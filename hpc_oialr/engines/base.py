"""What the engines of several ranks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hpc_oialr.distributed import World
from hpc_oialr.distributed.replicas import check_equal
from hpc_oialr.method.engine import Engine


class GroupEngine(Engine):
    """An engine of a process group; ``world`` holds all ranks."""

    world: World

    def send_initial(self, module: nn.Module) -> None:
        """Rank 0's parameters and buffers on every rank, before anything is split."""
        self.world.share(tensor.data for tensor in [*module.parameters(), *module.buffers()])

    def check_replicas(self, named: Mapping[str, Sequence[Tensor]]) -> None:
        """One all-reduce of 16 bytes a name."""
        check_equal(named, self.replicas)
