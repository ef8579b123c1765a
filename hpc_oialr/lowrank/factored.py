"""The product of a factored layer, and the same as one operator of torch for compiled code."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from hpc_oialr.lowrank.products import TORCH, FactoredFunction, backward, serving, through
from hpc_oialr.torch_compat import is_transformed


def factored_linear(x: Tensor, A: Tensor, S: Tensor, C: Tensor, bias: Tensor | None) -> Tensor:
    """``y = ((x A^T) S^T) C^T + bias`` by the kernels that serve, else by torch's products in a row.

    x is (..., n), A is r x n, S is r x r, C is m x r, y is (..., m). Derivatives of any order are right on every path.
    """
    compiling = torch.compiler.is_compiling()
    # On a GPU torch.compile sees the layer as one operator; an exported program must not depend on ours.
    ours = x.is_cuda and not torch.compiler.is_exporting() if compiling else not is_transformed()
    if ours and is_plain(x, A, S, C):
        x, A, S, C, bias = under_autocast(x, A, S, C, bias)
        y = None
        if not compiling:
            if (kernels := serving(x, A, S, C)) is not None:
                y = FactoredFunction.apply(x.reshape(-1, x.shape[-1]), A, S, C, bias, kernels)[0]  # type: ignore[no-untyped-call]
        elif TORCH.serve(x, A, S, C):  # the operator chooses among all kernels: it sees values
            y = torch.ops.hpc_oialr.factored_linear(x.reshape(-1, x.shape[-1]), A, S, C, bias)[0]
        if y is not None:
            return cast(Tensor, y.view(*x.shape[:-1], C.shape[0]))
    return F.linear(F.linear(F.linear(x, A), S), C, bias)


def is_plain(x: Tensor, A: Tensor, S: Tensor, C: Tensor) -> bool:
    """Whether nothing is a subclass or sparse, and the shapes fit: where they do not, torch's own error is clearer."""
    return (
        all(type(t) in (Tensor, torch.nn.Parameter) for t in (x, A, S, C))
        and x.layout is torch.strided
        and not x.is_meta
        and not x.is_nested
        and x.numel() > 0
        and x.shape[-1] == A.shape[1]
    )


def under_autocast(*tensors: Any) -> tuple[Any, ...]:
    """What torch's products would do first under autocast: cast, and record the casts."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or any(t is not None and t.dtype == torch.float64 for t in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if t is None else t.to(dtype) for t in tensors)


@torch.library.custom_op("hpc_oialr::factored_linear", mutates_args=())
def _operator(x: Tensor, A: Tensor, S: Tensor, C: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``y = x (C S A)^T + bias`` (B x m) and ``a = x A^T`` (B x r), all of one dtype."""
    a, y = through(x, A, S, C, bias, serving(x, A, S, C) or TORCH)
    return y, a


@_operator.register_fake
def _(x: Tensor, A: Tensor, S: Tensor, C: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], C.shape[0]), x.new_empty(x.shape[0], A.shape[0])


@torch.library.custom_op("hpc_oialr::factored_linear_backward", mutates_args=())
def _operator_backward(
    dy: Tensor, a: Tensor, A: Tensor, S: Tensor, C: Tensor, x: Tensor | None, needed: list[bool]
) -> list[Tensor]:
    """Gradients of x, A, S, C and bias, those that are ``needed``."""
    grads = backward(dy, a, A, S, C, x, needed, serving(dy, C.mT, S, A.mT) or TORCH)
    return [grad.contiguous() for grad in grads if grad is not None]


@_operator_backward.register_fake
def _(dy: Tensor, a: Tensor, A: Tensor, S: Tensor, C: Tensor, x: Tensor | None, needed: list[bool]) -> list[Tensor]:
    shapes = ((dy.shape[0], A.shape[1]), A.shape, S.shape, C.shape, (C.shape[0],))
    return [dy.new_empty(shape) for shape, need in zip(shapes, needed, strict=True) if need]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, S, C, _ = inputs
    ctx.save_for_backward(output[1], A, S, C, x if ctx.needs_input_grad[1] else None)
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad)
    if dy is None:
        return (None,) * 5
    grads = iter(torch.ops.hpc_oialr.factored_linear_backward(dy, *ctx.saved_tensors, needed))
    return tuple(next(grads) if need else None for need in needed)


_operator.register_autograd(_grads, setup_context=_keep)
