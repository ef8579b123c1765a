"""Which engine a run gets."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from hpc_oialr.engines.ddp import DDPEngine
from hpc_oialr.engines.fsdp import FSDPEngine
from hpc_oialr.errors import ModelError
from hpc_oialr.method.engine import Engine, SingleEngine
from hpc_oialr.processes import World

_OTHER_WRAPPERS = {
    "DataParallel": "use DistributedDataParallel, which copies nothing in each step",
    "FullyShardedDataParallel": "shard it by torch.distributed.fsdp.fully_shard (FSDP2) instead",
    "DeepSpeedEngine": "let oialr make the engine: --engine DeepSpeed",
    "AveragedModel": "pass the model that is trained, and this one as averages=[...]",
}


def make_engine(world: World, **ddp_options: Any) -> Engine:
    """The engine of a number of processes: none needed for one, :class:`DDPEngine` for more.

    Parameters
    ----------
    ddp_options
        Keyword arguments of :class:`DDPEngine`.
    """
    return SingleEngine(world) if world.size == 1 else DDPEngine(world, **ddp_options)


def adopt(model: nn.Module) -> tuple[Engine, nn.Module]:
    """The engine that a user's model implies, and the module inside.

    A model in ``DistributedDataParallel`` keeps its group and options, one that ``fully_shard`` has sharded
    its mesh; a plain one gets the process group that exists, or none. A collective call where there are
    several processes.

    Raises
    ------
    ModelError
        If the model is wrapped in something whose parameters cannot be replaced.
    """
    if isinstance(model, DistributedDataParallel):
        return DDPEngine.adopting(model), model.module
    if isinstance(model, FSDPModule):
        return FSDPEngine.adopting(model), model
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, DistributedDataParallel):
        return DDPEngine.adopting(compiled, outer=model), compiled.module
    for kind in type(model).__mro__:
        if kind.__name__ in _OTHER_WRAPPERS:
            raise ModelError(
                f"the model is wrapped in {kind.__name__}; must be plain, in DistributedDataParallel or sharded by "
                f"fully_shard: {_OTHER_WRAPPERS[kind.__name__]}."
            )
    return make_engine(World.current()), model
