"""DeepSpeed as a library: imported when it is needed, quiet, and without a compiler."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

from hpc_oialr.errors import MissingExtraError
from hpc_oialr.processes import World

# What DeepSpeed 0.19 calls and torch 2.13 deprecates; nothing a run could change.
_DEPRECATED = (
    "`torch.jit.script",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
)


def import_deepspeed(world: World) -> Any:
    """The module ``deepspeed``, prepared for the processes of ``world``.

    Its log is kept to errors: it warns of each optimizer that is not on its list. On CPUs it would compile an all-reduce through shared memory at the first
    start (over a minute); gloo does the same work without it.

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


def _describe(world: World) -> None:
    """What DeepSpeed reads from the environment, whoever started the processes."""
    place = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
    for name, value in place.items():
        os.environ.setdefault(name, str(value))
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
