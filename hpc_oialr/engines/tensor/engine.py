"""Tensor parallelism: several processes compute each layer together, from the same samples."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hpc_oialr.distributed import World
from hpc_oialr.engines.averaging import average_gradients
from hpc_oialr.engines.base import GroupEngine
from hpc_oialr.engines.tensor.layers import ShardedDense, ShardedFactors
from hpc_oialr.engines.tensor.pairs import bridges
from hpc_oialr.engines.tensor.sharding import LINEAR, shard_dense, shard_low_rank
from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank.attention import unpack
from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.layout import Sharded, local
from hpc_oialr.lowrank.selection import replaceable
from hpc_oialr.torch_compat import forget_shapes, require_dtensors

log = logging.getLogger(__name__)


class TensorEngine(GroupEngine):
    """Splits every layer over ``size`` processes, and deals the batch to groups of that many.

    Dense weights, ``U`` and ``Vh`` live in blocks as DTensors, with their gradients and their optimizer
    state; cores, norms, embeddings and biases of whole outputs are whole. A group of ``size`` processes works
    on the same samples and holds one model; gradients are averaged over groups after the backward pass.

    Parameters
    ----------
    world
        The processes; neighbours in rank share a model.
    size
        Processes to a model; a divisor of ``world.size``.
    bucket_mb
        Gradients travel joined up to this size (MiB).

    Notes
    -----
    A low-rank layer sends two all-reduces of tokens x r, one forward and one backward, where a dense one sends
    tokens x width. Between the layers of a pair (see ``pairs``) features stay split; around it they are whole,
    which costs an all-gather of the output forward and of the input's gradient backward.

    Weights that are tied, frozen, parametrized or of unknown kind stay whole, and are named in the log.
    """

    layout: Sharded

    def __init__(self, world: World, *, size: int, bucket_mb: float = 25.0) -> None:
        assert world.size % size == 0
        require_dtensors("TensorEngine")
        self.world, self._bucket_mb = world, bucket_mb
        shape, names = (world.size // size, size), ("data", "tensor")
        self.mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
        self.layout = Sharded(self.mesh, split_cores=False, even_columns=False)
        self._data = world.within(self.mesh.get_group("data"))
        self._trained: list[nn.Parameter] = []
        self._averaging = True

    @property
    def data(self) -> World:
        """One process of each group that shares a model."""
        return self._data

    @property
    def replicas(self) -> World:
        """The processes that hold the same blocks."""
        return self._data

    def place(self, module: nn.Module) -> None:
        """Send process 0's values to all, then keep this process's blocks, in place."""
        self.send_initial(module)
        for attention in [m for m in module.modules() if type(m) is nn.MultiheadAttention]:
            unpack(attention)
        targets, left = replaceable(module)
        linear = {target.name: target for target in targets if target.kind in LINEAR}
        found = bridges(module, self.pairs, linear, self.layout.size)
        takes = {bridge.second for bridge in found}
        gives = {name for bridge in found for name in bridge.first}
        for target in targets:
            shard_dense(
                target, self.layout, input_block=target.name in takes, output_block=target.name in gives
            )
        log.info("features stay split before: %s", ", ".join(sorted(takes)) or "no layer")
        if left:
            log.info("left whole: %s", "; ".join(f"{name} ({reason})" for name, reason in left.items()))

    def wrap(self, module: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """The module itself.

        Raises
        ------
        ModelError
            If :meth:`place` has not split it.
        """
        if not any(isinstance(m, (ShardedDense, ShardedFactors)) for m in module.modules()):
            raise ModelError(
                f"{type(module).__name__} has no layer that is split over processes; call engine.place(model) "
                "before the optimizer is made."
            )
        return self.rewrap(module)

    def rewrap(self, module: nn.Module) -> nn.Module:
        """The module itself; the gradients of what it trains now are averaged."""
        self._trained = [p for p in module.parameters() if p.requires_grad]
        forget_shapes()
        return module

    def on_replace(self, layer: LowRankWeight) -> None:
        """See that a layer that has become low-rank computes in blocks."""
        shard_low_rank(layer)

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Gradients are averaged after the next backward pass outside."""
        return self._without_averaging()

    @contextmanager
    def _without_averaging(self) -> Iterator[None]:
        self._averaging = False
        try:
            yield
        finally:
            self._averaging = True

    def backward(self, loss: Tensor, scaler: torch.amp.GradScaler) -> None:
        """Gradients of the mean loss over all samples, averaged after the whole backward pass."""
        super().backward(loss, scaler)
        if self._averaging:
            average_gradients(self._trained, self._data, bucket_mb=self._bucket_mb)

    @torch.no_grad()
    def clip(self, parameters: Sequence[nn.Parameter], norm: float) -> None:
        """Scale gradients so that the whole model's 2-norm is at most ``norm``: one all-reduce of one number."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        norms = torch.stack(torch._foreach_norm([local(g) for g in gradients])).double()
        split = torch.tensor([isinstance(g, DTensor) for g in gradients], device=norms.device)
        squares = norms.square()
        total = self.layout.add(squares[split].sum()) + squares[~split].sum()
        factor = (norm / (total.sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            local(gradient).mul_(factor.to(gradient.dtype))
