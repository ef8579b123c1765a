"""Which engine a run gets."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from hpc_oialr.distributed import World
from hpc_oialr.engines.ddp import DDPEngine
from hpc_oialr.engines.fsdp import FSDPEngine
from hpc_oialr.method.engine import Engine, SingleEngine


def make_engine(world: World, **ddp_options: Any) -> Engine:
    """The engine of a number of processes: none needed for one, :class:`DDPEngine` for more.

    Parameters
    ----------
    ddp_options
        Keyword arguments of :class:`DDPEngine`.
    """
    return SingleEngine(world) if world.size == 1 else DDPEngine(world, **ddp_options)


def engine_of(model: nn.Module) -> tuple[Engine, nn.Module]:
    """The engine of a wrapped model or of one of several processes, and the module inside; a collective call.

    A model in ``DistributedDataParallel`` keeps its group and options, one that ``fully_shard`` has sharded
    its mesh; a plain one gets the process group that exists.
    """
    if isinstance(model, DistributedDataParallel):
        return DDPEngine.adopting(model), model.module
    if isinstance(model, FSDPModule):
        return FSDPEngine.adopting(model), model
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, DistributedDataParallel):
        return DDPEngine.adopting(compiled, outer=model), compiled.module
    return make_engine(World.current()), model
