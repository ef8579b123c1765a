"""FSDP2 around a module whose parameters are replaced during the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from hpc_oialr import torch_compat
from hpc_oialr.distributed import World
from hpc_oialr.engines.base import GroupEngine
from hpc_oialr.lowrank import TargetWeight
from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.layout import Sharded
from hpc_oialr.lowrank.targets import kind_of

if TYPE_CHECKING:
    from hpc_oialr.torch_compat import FSDPParam


class FSDPEngine(GroupEngine):
    """Shards every parameter over ranks, with its gradient and its optimizer state.

    ``U`` and ``Vh`` are sharded and gathered too, but have no gradient and no reduce-scatter; or FSDP2 leaves them
    alone, and every rank has them whole (``frozen``). The other options are those of
    :class:`~hpc_oialr.engines.settings.FSDP`; ``mesh`` is made from ``replicas`` unless given. Parameters are gathered
    and used in ``gather_dtype`` (None: their own); gradients are summed in fp32.

    Notes
    -----
    A step gathers each parameter twice (forward and backward), ``(P - 1)/P`` of its size a rank, and reduce-scatters the
    gradients of trained parameters. Blocks (children of the outermost ``nn.ModuleList`` and ``nn.Sequential``) are
    gathered one by one, the rest of the model together.
    """

    def __init__(
        self,
        world: World,
        *,
        replicas: int = 1,
        reshard_after_forward: bool = True,
        frozen: Literal["sharded", "replicated"] = "sharded",
        gather_dtype: torch.dtype | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        torch_compat.require_dtensors("FSDPEngine", "FSDPParam", "ParamModuleInfo")
        assert dist.is_initialized()
        self.world = world
        if mesh is None:
            shape = (world.size,) if replicas == 1 else (replicas, world.size // replicas)
            names = ("replicate", "shard")[-len(shape) :]
            mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
        self.mesh = mesh
        self.layout: Sharded = Sharded(mesh, whole_bases=frozen == "replicated")
        self._reshard = reshard_after_forward
        summed = None if gather_dtype is None else torch.float32
        self.casts_itself = gather_dtype is not None
        self._precision = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=summed)
        self._replicas = world.within(mesh.get_group(0)) if mesh.ndim > 1 else World(device=world.device)

    @classmethod
    def adopting(cls, module: FSDPModule) -> FSDPEngine:
        """An engine for a model that the user has sharded by ``fully_shard``, including the root."""
        assert isinstance(module, nn.Module)
        return cls(World.current(), mesh=next(_groups(module)).mesh_info.mesh)

    @property
    def whole_bases(self) -> bool:
        """Whether FSDP2 leaves U and Vh alone."""
        return self.layout.whole_bases

    @property
    def replicas(self) -> World:
        """The ranks that hold the same shards."""
        return self._replicas

    def place(self, module: nn.Module) -> None:
        """Send rank 0's values to all, then shard block by block, in place."""
        self.send_initial(module)
        for block in [*blocks(module), module]:
            fully_shard(block, mesh=self.mesh, reshard_after_forward=self._reshard, mp_policy=self._precision)

    def wrap(self, module: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """The module itself, sharded by :meth:`place` if it is not yet."""
        if not isinstance(module, FSDPModule):
            self.place(module)
        self._root = module
        return module

    def rewrap(self, module: nn.Module) -> nn.Module:
        """The module itself: only layers whose r changed were resharded, by :meth:`replacing`."""
        torch_compat.forget_shapes()
        return module

    def gather(self, target: TargetWeight) -> None:
        """Reshard what is still gathered, as after a forward pass without a backward."""
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _on_replace(self, layer: LowRankWeight) -> None:
        """Let FSDP2 manage the factors of ``layer`` that are DTensors, in place of the parameters that are gone.

        FSDP2 makes its parameter groups once and has no public way to change them. It represents a parameter by an
        ``FSDPParam``; those of the layer are swapped in their group (internals of torch 2.11 to 2.14).
        """
        for group in _groups(self._root):
            gone = [member for member in group.fsdp_params if not _is_current(member)]
            if not gone:
                continue
            for member in gone:
                member._post_load_hook_handle.remove()
            known = {member.sharded_param for member in group.fsdp_params}
            factors = [(name, p) for name, p in layer.named_parameters(recurse=False) if isinstance(p, DTensor)]
            new = [(name, p) for name, p in factors if p not in known]
            stay = [member for member in group.fsdp_params if member not in gone]
            group.fsdp_params[:] = stay + [_managed(group, layer, name, p) for name, p in new]
            group._init_mp_dtypes()
            return

    @contextmanager
    def no_sync(self, wrapped: nn.Module) -> Iterator[None]:
        """Gradients stay unsharded, and are summed in the next backward pass outside."""
        assert isinstance(wrapped, FSDPModule)
        wrapped.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            wrapped.set_requires_gradient_sync(True)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model: children of the outermost ``ModuleList`` and ``Sequential``.

    Layers that can become low-rank are left out, since they change their class.
    """
    found: list[nn.Module] = []
    pending = [module]
    while pending:
        parent = pending.pop()
        for child in parent.children():
            repeated = isinstance(parent, (nn.ModuleList, nn.Sequential))
            if repeated and kind_of(type(child)) is None and any(True for _ in child.parameters()):
                found.append(child)
            else:
                pending.append(child)
    return found


def _groups(root: nn.Module) -> Iterator[Any]:
    """FSDP2's parameter groups of a model."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            yield from torch_compat.fsdp_param_groups(module)


def _is_current(member: FSDPParam) -> bool:
    info = member._module_info
    return info.module._parameters.get(info.param_name) is member.sharded_param


def _managed(group: Any, layer: nn.Module, name: str, parameter: nn.Parameter) -> FSDPParam:
    """FSDP2's object for a parameter that is a DTensor already, made from its shape alone."""
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
