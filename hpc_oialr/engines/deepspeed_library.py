"""DeepSpeed as a library: imported when it is needed, quiet, and without a compiler."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch.distributed as dist

from hpc_oialr.distributed import World
from hpc_oialr.errors import MissingExtraError

# What DeepSpeed 0.19 calls and torch 2.13 deprecates; nothing a run could change.
_DEPRECATED = (
    "`torch.jit.script",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
)


def import_deepspeed(world: World) -> Any:
    """The module ``deepspeed``, prepared for the processes of ``world``.

    Its log is kept to errors: it warns of each optimizer that is not on its list. On CPUs it would compile
    an all-reduce through shared memory at the first start (over a minute); gloo does the same without it.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    _describe(world)
    for message in _DEPRECATED:
        warnings.filterwarnings("ignore", message=message)
    try:
        import deepspeed
    except ImportError as error:
        raise MissingExtraError("deepspeed", "deepspeed", purpose="the engine DeepSpeed") from error
    if world.device.type == "cpu":
        # DeepSpeed's table of what it could compile, which it would fill by asking the compiler.
        deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def forget_groups() -> None:
    """Empty DeepSpeed's table of process groups, which end now; it would go on with them in a next run."""
    from deepspeed.comm import comm
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.utils import groups

    comm.cdb = None
    parameter_offload.FWD_MODULE_STACK.clear()
    for name, value in list(vars(groups).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(groups, name, None)
        elif name.startswith("_") and name.endswith("GROUP") and isinstance(value, dict):
            value.clear()


def _describe(world: World) -> None:
    """What DeepSpeed reads from the environment, whoever started the processes."""
    place = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
    for name, value in place.items():
        os.environ.setdefault(name, str(value))
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # How many "devices" a node has: else it asks numactl, a process, at every reduction of a gradient.
        os.environ.setdefault("LOCAL_SIZE", str(world.local_size))
