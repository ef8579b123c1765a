"""The mean of gradients over processes, after the backward pass, in a few large messages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from hpc_oialr.distributed import World
from hpc_oialr.lowrank.layout import local


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], world: World, *, bucket_mb: float = 25.0) -> None:
    """Replace each gradient by its mean over the processes of ``world``; of a DTensor's, the local part.

    Parameters
    ----------
    parameters
        In the same order on every process, with gradients of the same ones.
    bucket_mb
        Gradients travel joined up to this size (MiB), all buckets at once.

    Notes
    -----
    One all-reduce of every number; a copy of the gradients for as long as it takes.
    """
    if world.size == 1:
        return
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    under_way = []
    for bucket in _buckets(gradients, bucket_mb * 2**20):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).div_(world.size)
        under_way.append((bucket, flat, world.start_all_reduce(flat)))
    for bucket, flat, pending in under_way:
        assert pending is not None
        pending.wait()
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])


def _buckets(gradients: Iterable[Tensor], size: float) -> Iterator[list[Tensor]]:
    """Runs of gradients of one dtype, each of at most ``size`` bytes or one gradient."""
    by_dtype: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_dtype[gradient.dtype].append(gradient)
    for members in by_dtype.values():
        bucket: list[Tensor] = []
        held = 0
        for gradient in members:
            if bucket and held + gradient.nbytes > size:
                yield bucket
                bucket, held = [], 0
            bucket.append(gradient)
            held += gradient.nbytes
        yield bucket
