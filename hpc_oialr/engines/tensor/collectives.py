"""Collectives of tensor parallelism with their gradients.

Features (..., n) or their gradient are *whole* (equal on every rank), a *block* (this rank's columns, as in
:class:`~hpc_oialr.lowrank.layout.Sharded`) or *partial* (to be summed over ranks); each function says which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from hpc_oialr.lowrank.layout import Sharded


def reduce_from(x: Tensor, layout: Sharded) -> Tensor:
    """The whole of a partial ``x``; the gradient is whole. One all-reduce of ``x``'s size forward, nothing backward."""
    return _apply(x, _sum, _same, layout, 0)


def copy_to(x: Tensor, layout: Sharded) -> Tensor:
    """A whole ``x`` whose gradient is partial. Nothing forward, one all-reduce of ``x``'s size backward."""
    return _apply(x, _same, _sum, layout, 0)


def scatter_to(x: Tensor, layout: Sharded) -> Tensor:
    """This rank's block of a whole ``x`` (..., n): nothing forward, an all-gather of ``x`` backward."""
    return _apply(x, _block, _gather, layout, x.shape[-1])


def gather_from(x: Tensor, n: int, layout: Sharded) -> Tensor:
    """The whole (..., n) of blocks ``x``; the gradient is whole: an all-gather forward, nothing backward."""
    return _apply(x, _gather, _block, layout, n)


Operation = Callable[[Tensor, Sharded, int], Tensor]


class _Linear(Function):
    """A linear operation and its transpose, which the backward pass swaps, for derivatives of any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operation: Operation, transpose: Operation, layout: Sharded, n: int) -> Tensor:
        ctx.backward_arguments = transpose, operation, layout, n
        return operation(x, layout, n)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _apply(grads[0], *ctx.backward_arguments), None, None, None, None


def _apply(x: Tensor, *arguments: Any) -> Tensor:
    return cast(Tensor, _Linear.apply(x, *arguments))  # type: ignore[no-untyped-call]


def _same(x: Tensor, layout: Sharded, n: int) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, layout: Sharded, n: int) -> Tensor:
    # A copy: the tensor may be a view, or a gradient that autograd hands to others too.
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=layout.group)
    return x


def _block(x: Tensor, layout: Sharded, n: int) -> Tensor:
    return x[..., layout.own_columns(n)].contiguous()


def _gather(x: Tensor, layout: Sharded, n: int) -> Tensor:
    """Blocks are padded to the largest one, because an all-gather needs equal sizes."""
    chunk = -(-n // layout.size)
    x = F.pad(x, (0, chunk - x.shape[-1])).contiguous()
    blocks = x.new_empty(layout.size, *x.shape)
    dist.all_gather(list(blocks), x, group=layout.group)
    return blocks.movedim(0, -2).flatten(-2)[..., :n].contiguous()
