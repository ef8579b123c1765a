"""The three products of a factored layer: ``y = ((x A^T) S^T) C^T + bias`` with A and C frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hpc_oialr.lowrank.transforms import is_transformed
from hpc_oialr.torch_compat import onednn_enabled, onednn_linear, register_onednn_flops

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
    ``benchmarks/results/layer.json``. Everywhere else the products are torch's own: inside
    ``torch.backends.mkldnn.flags(enabled=False)``, under autocast, ``torch.compile``, ``torch.export``, ``torch.func``
    and forward-mode derivatives, for an r that is no multiple of 8. Derivatives of any order are right on both paths.
    """
    if not is_transformed() and _thin_on_cpu(x, A, S, C):
        y: Tensor = _Chain.apply(x.reshape(-1, x.shape[-1]), A, S, C, bias)[0]  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], C.shape[0])
    return F.linear(F.linear(F.linear(x, A), S), C, bias)


def _thin_on_cpu(x: Tensor, A: Tensor, S: Tensor, C: Tensor) -> bool:
    plain = all(type(t) in (Tensor, torch.nn.Parameter) for t in (x, A, S, C))
    return (
        x.device.type == "cpu"
        and plain
        and x.layout is torch.strided
        and not x.is_nested
        and all(t.dtype == torch.float32 for t in (x, A, S, C))
        and not (A.requires_grad or C.requires_grad)
        and x.numel() > 0
        and x.shape[-1] == A.shape[1]  # otherwise torch's error is the clearer one
        and S.shape[0] % MULTIPLE == 0
        and onednn_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


register_onednn_flops()


class _Chain(torch.autograd.Function):
    """``y`` and ``a = x A^T`` (B x r), which is kept for the gradient of S in place of x.

    ``a`` is an output, though no one uses it, so that a second derivative finds its way from it back to x.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, S: Tensor, C: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        a = onednn_linear(x, A)
        ctx.save_for_backward(a, A, S, C)
        ctx.set_materialize_grads(False)
        return onednn_linear(onednn_linear(a, S), C, bias), a

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, da: Tensor | None) -> tuple[Tensor | None, ...]:
        a, A, S, C = ctx.saved_tensors
        for_x, _, for_S, _, for_bias = ctx.needs_input_grad
        # With create_graph, gradients are recorded (and oneDNN's are not); da is only there in a second derivative.
        multiply = onednn_linear if not (torch.is_grad_enabled() or is_transformed()) else F.linear
        dS = dx = dbias = None
        if dy is not None:
            if for_x or for_S:
                db = multiply(dy, C.mT)
                dS = db.mT @ a if for_S else None
                through = multiply(db, S.mT) if for_x else None
                da = through if da is None else da if through is None else through + da
            dbias = dy.sum(0) if for_bias else None
        if for_x and da is not None:
            dx = multiply(da, A.mT)
        return dx, None, dS, None, dbias
