"""New parameters for a layer that FSDP2 manages.

FSDP2 makes its parameter groups once and has no public way to change them. Its bookkeeping of one
parameter is an ``FSDPParam``; this file, the only one that touches FSDP2's internals (as of torch 2.11 to 2.14),
swaps those of one layer in the group they are in. Hooks, groups and all other parameters stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from hpc_oialr import torch_compat
from hpc_oialr.lowrank.base import LowRankWeight

if TYPE_CHECKING:
    from hpc_oialr.torch_compat import FSDPParam


def replace_parameters(root: nn.Module, layer: LowRankWeight) -> None:
    """Let FSDP2 manage the factors of ``layer`` in place of the parameters that are gone.

    Parameters
    ----------
    root
        The sharded model, of which nothing is gathered at the moment.
    layer
        Holds its factors as DTensors.
    """
    for group in groups(root):
        gone = [member for member in group.fsdp_params if not _is_current(member)]
        if not gone:
            continue
        for member in gone:
            member._post_load_hook_handle.remove()
        known = {member.sharded_param for member in group.fsdp_params}
        new = [(name, p) for name, p in layer.named_parameters(recurse=False) if p not in known]
        stay = [member for member in group.fsdp_params if member not in gone]
        group.fsdp_params[:] = stay + [_managed(group, layer, name, p) for name, p in new]
        group._init_mp_dtypes()
        return


def groups(root: nn.Module) -> Iterator[Any]:
    """FSDP2's parameter groups of a model."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            yield from torch_compat.fsdp_param_groups(module)


def _is_current(member: FSDPParam) -> bool:
    info = member._module_info
    return info.module._parameters.get(info.param_name) is member.sharded_param


def _managed(group: Any, layer: nn.Module, name: str, parameter: nn.Parameter) -> FSDPParam:
    """FSDP2's bookkeeping of a parameter that is a DTensor already, made from its shape alone."""
    assert isinstance(parameter, DTensor)
    shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    split = next(p for p in parameter.placements if isinstance(p, Shard))
    member = torch_compat.FSDPParam(
        nn.Parameter(shape, requires_grad=parameter.requires_grad),
        torch_compat.ParamModuleInfo(layer, name),
        group.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        lambda _: split,
        group.mp_policy,
        group.offload_policy,
    )
    layer._parameters[name] = parameter
    member.reset_sharded_param()
    return member
