"""The three products of a factored layer: ``y = ((x A^T) S^T) C^T + bias`` with A and C frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# oneDNN compiles each new shape, about 8 a layer, and torch keeps the last 1,024 of them, some 0.6 MiB each (torch
# 2.13): with an r for every number, a process would grow by that at each update.
MULTIPLE = 8


def chain(x: Tensor, A: Tensor, S: Tensor, C: Tensor, bias: Tensor | None) -> Tensor:
    """Factored execution of a linear layer.

    Parameters
    ----------
    x
        (..., n).
    A, S, C
        r x n, r x r and m x r.
    bias
        m, or None.

    Returns
    -------
    Tensor
        (..., m).

    Notes
    -----
    In fp32 on CPUs the products go to oneDNN, which torch uses for bf16 only: at ViT-B/16's shapes it multiplies thin
    matrices faster than the BLAS behind ``torch.mm``, and adds the bias in the same pass; the ratios are in
    ``benchmarks/results/layer.json``. That path has no second derivative; inside
    ``torch.backends.mkldnn.flags(enabled=False)``, under autocast and ``torch.compile``, for an r that is no
    multiple of 8, and everywhere else the products are torch's own.
    """
    # First, since torch.compile cannot look behind the others.
    if not torch.compiler.is_compiling() and _thin_on_cpu(x, A, S, C):
        y: Tensor = _Chain.apply(x.reshape(-1, x.shape[-1]), A, S, C, bias)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], C.shape[0])
    return F.linear(F.linear(F.linear(x, A), S), C, bias)


def _thin_on_cpu(x: Tensor, A: Tensor, S: Tensor, C: Tensor) -> bool:
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in (x, A, S, C))
    return (
        x.device.type == "cpu"
        and plain
        and all(t.dtype == torch.float32 for t in (x, A, S, C))
        and not (A.requires_grad or C.requires_grad)
        and x.numel() > 0
        and S.shape[0] % MULTIPLE == 0
        and torch.backends.mkldnn.is_available()
        and bool(torch._C._get_mkldnn_enabled())
        and not torch.is_autocast_enabled("cpu")
    )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` of two matrices on the CPU, without a graph."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


class _Chain(torch.autograd.Function):
    """Keeps ``x A^T`` (B x r) for the gradient of S, not x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, S: Tensor, C: Tensor, bias: Tensor | None) -> Tensor:
        a = onednn_linear(x, A)
        ctx.save_for_backward(a, A, S, C)
        return onednn_linear(onednn_linear(a, S), C, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, A, S, C = ctx.saved_tensors
        for_x, _, for_S, _, for_bias = ctx.needs_input_grad
        dS = dx = None
        if for_x or for_S:
            db = onednn_linear(dy, C.mT)
            dS = db.mT @ a if for_S else None
            dx = onednn_linear(onednn_linear(db, S.mT), A.mT) if for_x else None
        return dx, None, dS, None, dy.sum(0) if for_bias else None
