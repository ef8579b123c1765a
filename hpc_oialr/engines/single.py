"""One process: nothing to wrap."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.optim import Optimizer

from hpc_oialr.engines.base import Engine
from hpc_oialr.lowrank.layout import REPLICATED
from hpc_oialr.processes import World


class SingleEngine(Engine):
    """The module itself, without a process group."""

    layout = REPLICATED
    whole_factors = True

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World.single()

    def wrap(self, module: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """The module."""
        return module

    def rewrap(self, module: nn.Module) -> nn.Module:
        """The module."""
        return module

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Nothing: gradients are local anyway."""
        return nullcontext()
