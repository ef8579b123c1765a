"""FSDP2 around a module whose parameters are replaced now and then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from hpc_oialr.distributed import World
from hpc_oialr.engines.base import GroupEngine
from hpc_oialr.engines.fsdp_groups import groups, replace_parameters
from hpc_oialr.lowrank import TargetWeight
from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.layout import Sharded
from hpc_oialr.lowrank.targets import kind_of
from hpc_oialr.torch_compat import forget_shapes, require_fsdp


class FSDPEngine(GroupEngine):
    """Shards every parameter over processes, with its gradient and its optimizer state.

    ``U`` and ``Vh`` are sharded and gathered like the others, but have no gradient and no reduce-scatter.

    Parameters
    ----------
    world
        The processes; two or more.
    replicas
        Groups of processes that hold the whole model each (HSDP); gradients are averaged over them.
    reshard_after_forward
        As in ``fully_shard``.
    gather_dtype
        Parameters travel and compute in this dtype; gradients are summed in fp32. None: their own.
    mesh
        Made from ``replicas`` unless it exists already.

    Notes
    -----
    A step gathers each parameter twice (forward and backward), ``(P - 1)/P`` of its size a process, and
    reduce-scatters the gradient of what is trained. Blocks (children of ``nn.ModuleList`` and
    ``nn.Sequential`` at the outermost level) are gathered one by one, the rest of the model as one.
    """

    def __init__(
        self,
        world: World,
        *,
        replicas: int = 1,
        reshard_after_forward: bool = True,
        gather_dtype: torch.dtype | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        require_fsdp("FSDPEngine")
        self.world = world
        self.mesh = _mesh(world, replicas) if mesh is None else mesh
        self.layout: Sharded = Sharded(self.mesh)
        self._reshard = reshard_after_forward
        self._root: nn.Module | None = None
        summed = None if gather_dtype is None else torch.float32
        self._precision = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=summed)
        self._replicas = World(device=world.device)
        if self.mesh.ndim > 1:
            self._replicas = world.within(self.mesh.get_group(0))

    @classmethod
    def adopting(cls, module: FSDPModule) -> FSDPEngine:
        """An engine that goes on with a model its user has sharded by ``fully_shard``, the root included."""
        assert isinstance(module, nn.Module)
        return cls(World.current(), mesh=next(groups(module)).mesh_info.mesh)

    @property
    def replicas(self) -> World:
        """The processes that hold the same shards."""
        return self._replicas

    def place(self, module: nn.Module) -> None:
        """Send process 0's values to all, then shard block by block, in place."""
        self.send_initial(module)
        for block in [*blocks(module), module]:
            fully_shard(block, mesh=self.mesh, reshard_after_forward=self._reshard, mp_policy=self._precision)

    def wrap(self, module: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """The module itself, which :meth:`place` has sharded; a module that is not yet sharded is."""
        if not isinstance(module, FSDPModule):
            self.place(module)
        self._root = module
        return module

    def rewrap(self, module: nn.Module) -> nn.Module:
        """The module itself: only layers whose r changed were sharded anew, by :meth:`on_replace`."""
        forget_shapes()
        return module

    def gather(self, target: TargetWeight) -> None:
        """See that nothing is left gathered, as after a forward pass without a backward."""
        assert self._root is not None
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def on_replace(self, layer: LowRankWeight) -> None:
        """Let FSDP2 know the new parameters of one layer, and forget the old ones."""
        assert self._root is not None
        replace_parameters(self._root, layer)

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Gradients are summed in the next backward pass outside; they stay whole until then."""
        return _unsynchronised(wrapped)


@contextmanager
def _unsynchronised(wrapped: nn.Module) -> Iterator[None]:
    assert isinstance(wrapped, FSDPModule)
    wrapped.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        wrapped.set_requires_gradient_sync(True)


def _mesh(world: World, replicas: int) -> DeviceMesh:
    assert dist.is_initialized()
    kind = world.device.type
    if replicas == 1:
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    shape = (replicas, world.size // replicas)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated parts of a model, outermost lists only: children of ``ModuleList`` and ``Sequential``.

    Layers that can become low-rank change their class and cannot be blocks of their own.
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
