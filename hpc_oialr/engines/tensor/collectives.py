"""Collectives of tensor parallelism with their gradients.

A tensor of features (..., n) is *whole* (equal on every process), a *block* (this process's columns, dealt
as :class:`~hpc_oialr.lowrank.layout.Sharded` deals them) or *partial* (the whole is the sum over processes).
Gradients come in the same three states; each function below says which it takes and gives.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from hpc_oialr.lowrank.layout import Sharded


def reduce_from(x: Tensor, layout: Sharded) -> Tensor:
    """The whole of a partial ``x``; what follows is done alike on every process, so its gradient is whole.

    One all-reduce of ``x``'s size forward, nothing backward.
    """
    return _apply(_ReduceFrom, x, layout.group)


def copy_to(x: Tensor, layout: Sharded) -> Tensor:
    """A whole ``x`` that each process uses for a part of the work: its gradients are partial.

    Nothing forward, one all-reduce of ``x``'s size backward.
    """
    return _apply(_CopyTo, x, layout.group)


def scatter_to(x: Tensor, layout: Sharded) -> Tensor:
    """This process's block of a whole ``x`` (..., n): nothing forward, an all-gather of ``x`` backward."""
    return _apply(_ScatterTo, x, layout)


def gather_from(x: Tensor, n: int, layout: Sharded) -> Tensor:
    """The whole (..., n) of blocks ``x``, used alike on every process: an all-gather forward, nothing backward."""
    return _apply(_GatherFrom, x, n, layout)


def _apply(function: type[Function], *arguments: Any) -> Tensor:
    return cast(Tensor, function.apply(*arguments))


# Each backward pass is the forward pass of the opposite function, so that derivatives of any order are right.
class _ReduceFrom(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _apply(_CopyTo, grads[0], ctx.group), None


class _CopyTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _apply(_ReduceFrom, grads[0], ctx.group), None


class _ScatterTo(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Sharded) -> Tensor:
        ctx.layout, ctx.n = layout, x.shape[-1]
        return x[..., layout.own_columns(ctx.n)].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _apply(_GatherFrom, grads[0], ctx.n, ctx.layout), None


class _GatherFrom(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, layout: Sharded) -> Tensor:
        ctx.layout = layout
        return _gather(x, n, layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _apply(_ScatterTo, grads[0], ctx.layout), None, None


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    # A copy: the tensor may be a view, or a gradient that autograd hands to others too.
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _gather(x: Tensor, n: int, layout: Sharded) -> Tensor:
    """Blocks travel padded to the largest one, because an all-gather wants equal sizes."""
    chunk = -(-n // layout.size)
    x = F.pad(x, (0, chunk - x.shape[-1])).contiguous()
    blocks = x.new_empty(layout.size, *x.shape)
    dist.all_gather(list(blocks), x, group=layout.group)
    return blocks.movedim(0, -2).flatten(-2)[..., :n].contiguous()
