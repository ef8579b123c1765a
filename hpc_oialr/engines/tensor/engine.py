"""Tensor parallelism: several ranks compute each layer together, on the same samples."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from hpc_oialr.distributed import World
from hpc_oialr.engines.base import GroupEngine
from hpc_oialr.engines.tensor.layers import LINEAR, ShardedDense, ShardedFactors, shard_dense, shard_low_rank
from hpc_oialr.engines.tensor.pairs import bridges
from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank.attention import unpack
from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.layout import Sharded, local
from hpc_oialr.lowrank.selection import replaceable
from hpc_oialr.torch_compat import forget_shapes, require_dtensors

log = logging.getLogger(__name__)


class TensorEngine(GroupEngine):
    """Shards every layer over ``size`` ranks, and the batch over groups of that many.

    Dense weights, ``U`` and ``Vh`` are DTensors, with their gradients and optimizer state; cores, norms, embeddings and
    biases of whole outputs are replicated. Weights that are tied, frozen, parametrized or of unknown kind stay whole and
    are named in the log. A group of ``size`` neighbouring ranks computes the same samples; gradients are averaged over
    groups after the backward pass, in buckets of up to ``bucket_mb`` (MiB).

    Notes
    -----
    A low-rank layer sends two all-reduces of tokens x r, one forward and one backward, where a dense one sends
    tokens x width. Between the layers of a pair (see ``pairs``) features stay sharded; elsewhere they are whole, which
    costs an all-gather of the output forward and of the input's gradient backward.
    """

    layout: Sharded
    importances = ("weights",)
    whole_features = False

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
    def data_parallel(self) -> World:
        """One rank of each group."""
        return self._data

    replicas = data_parallel  # they hold the same blocks

    def place(self, module: nn.Module) -> None:
        """Send rank 0's values to all, then keep this rank's shards, in place."""
        self.send_initial(module)
        for attention in [m for m in module.modules() if type(m) is nn.MultiheadAttention]:
            unpack(attention)
        targets, left = replaceable(module)
        linear = {target.name: target for target in targets if target.kind in LINEAR}
        found = bridges(module, self.pairs, linear, self.layout.size)
        before = {name for first, _ in found for name in first}
        after = {second for _, second in found}
        for target in targets:
            name = target.name
            shard_dense(target, self.layout, input_block=name in after, output_block=name in before)
        log.info("features stay split before: %s", ", ".join(sorted(after)) or "no layer")
        if left:
            log.info("left whole: %s", "; ".join(f"{name} ({reason})" for name, reason in left.items()))

    def wrap(self, module: nn.Module, optimizer: Optimizer | None = None) -> nn.Module:
        """The module itself; raises :class:`ModelError` if :meth:`place` has not sharded it."""
        if not any(isinstance(m, (ShardedDense, ShardedFactors)) for m in module.modules()):
            raise ModelError(
                f"{type(module).__name__} has no layer that is split over ranks; call engine.place(model) "
                "before the optimizer is made."
            )
        return self.rewrap(module)

    def rewrap(self, module: nn.Module) -> nn.Module:
        """The module itself; gradients of its present trained parameters are averaged."""
        self._trained = [p for p in module.parameters() if p.requires_grad]
        forget_shapes()
        return module

    def _on_replace(self, layer: LowRankWeight) -> None:
        """Let a layer that has become low-rank compute on its shards."""
        shard_low_rank(layer)

    @contextmanager
    def no_sync(self, wrapped: nn.Module) -> Iterator[None]:
        """Gradients are averaged after the next backward pass outside."""
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
        """Scale gradients to a 2-norm of at most ``norm`` over the whole model: one all-reduce of one number."""
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


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], world: World, *, bucket_mb: float = 25.0) -> None:
    """Replace each gradient, of a DTensor its local shard, by its mean over the ranks of ``world``.

    ``parameters`` have the same order on every rank. All-reduces of up to ``bucket_mb`` (MiB), all at once: needs a
    copy of the gradients meanwhile.
    """
    if world.size == 1:
        return
    by_dtype: defaultdict[torch.dtype, list[list[Tensor]]] = defaultdict(list)
    for gradient in (local(p.grad) for p in parameters if p.grad is not None):
        buckets = by_dtype[gradient.dtype]
        if not buckets or sum(g.nbytes for g in buckets[-1]) + gradient.nbytes > bucket_mb * 2**20:
            buckets.append([])
        buckets[-1].append(gradient)
    under_way = []
    for bucket in (bucket for buckets in by_dtype.values() for bucket in buckets):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).div_(world.size)
        under_way.append((bucket, flat, world.start_all_reduce(flat)))
    for bucket, flat, pending in under_way:
        assert pending is not None
        pending.wait()
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])
