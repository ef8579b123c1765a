"""A whole tensor cut into rows, one block a process: for checkpoints that no process could hold alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from hpc_oialr.processes import World


def row_block(whole: Tensor, world: World) -> Tensor:
    """This process's rows of a tensor that all hold, as a DTensor; one without axes stays whole."""
    if whole.dim() == 0:
        return whole
    length = -(-whole.shape[0] // world.size)
    start = min(whole.shape[0], world.rank * length)
    return DTensor.from_local(
        whole[start : start + length].clone(),
        _mesh(world),
        [Shard(0)],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def _mesh(world: World) -> DeviceMesh:
    return DeviceMesh(world.device.type, torch.arange(world.size), mesh_dim_names=("rows",))
