"""The products of a factored layer, ``y = x (U S Vh)^T + bias``, and which kernels compute them.

Where it saves operations the core is folded into a basis (``U S`` forward, ``S Vh`` backward): two thin products each
way in place of three. A further way to compute is a :class:`Kernels` and its line in :data:`KERNELS`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hpc_oialr.linalg.arithmetic import without_autocast
from hpc_oialr.lowrank.execution import folds
from hpc_oialr.torch_compat import (
    is_transformed,
    is_watched,
    onednn_enabled,
    onednn_linear,
    register_onednn_flops,
)

TRITON = importlib.util.find_spec("triton") is not None


class Kernels(NamedTuple):
    """A way to compute."""

    serve: Callable[[Tensor, Tensor, Tensor, Tensor], bool]  # whether it may be used for x, A, S, C
    linear: Callable[..., Tensor]  # x P^T + bias
    # t = x P^T and y = t Q^T + bias in one; None: by linear.
    pair: Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]] | None = None


class FactoredFunction(torch.autograd.Function):
    """``y`` and ``a = x A^T`` (B x r), which is saved for the gradient of S in place of x.

    ``a`` is an output, though no caller uses it, so that a second derivative can flow through it to x.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, A: Tensor, S: Tensor, C: Tensor, bias: Tensor | None, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        a, y = through(x, A, S, C, bias, kernels)
        ctx.kernels = kernels
        ctx.save_for_backward(a, A, S, C, x if A.requires_grad else None)
        ctx.set_materialize_grads(False)
        return y, a

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, da: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        a, A, S, C, x = ctx.saved_tensors
        # With create_graph, gradients are recorded: only torch's products can be, and da may be given.
        kernels = TORCH if torch.is_grad_enabled() or is_transformed() else ctx.kernels
        needed = ctx.needs_input_grad[:5]
        grads: list[Tensor | None] = [None] * 5
        if dy is not None:
            grads = backward(dy, a, A, S, C, x, needed, kernels)
        if da is not None:
            for i, (need, left, right) in enumerate(((needed[0], da, A), (needed[1], da.mT, x))):
                if need:
                    grad = grads[i]
                    grads[i] = left @ right if grad is None else grad + left @ right
        return *grads, None


@without_autocast()
def backward(
    dy: Tensor,
    a: Tensor,
    A: Tensor,
    S: Tensor,
    C: Tensor,
    x: Tensor | None,
    needed: Sequence[bool],
    kernels: Kernels,
) -> list[Tensor | None]:
    """Gradients of x, A, S, C and bias, those that are ``needed``, in the dtype of the forward pass.

    ``x`` is needed for the gradient of A only. Without autocast, which casts some of the operands where
    ``loss.backward()`` is called inside it.
    """
    for_x, for_A, for_S, for_C, for_bias = needed
    dx = None
    if for_x:
        db, dx = through(dy, C.mT, S.mT, A.mT, None, kernels)
    elif for_S or for_A:
        db = kernels.linear(dy, C.mT)
    return [
        dx,
        (db @ S).mT @ x if for_A and x is not None else None,
        db.mT @ a if for_S else None,
        dy.mT @ (a @ S.mT) if for_C else None,
        dy.sum(0) if for_bias else None,
    ]


def through(
    x: Tensor, P: Tensor, core: Tensor, Q: Tensor, bias: Tensor | None, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """``t = x P^T`` and ``y = t core^T Q^T + bias``, the core folded into Q where that is cheaper.

    With P = Vh, Q = U it is the forward pass; with P = U^T, Q = Vh^T and the core transposed it takes dy to the gradients
    of ``U^T y`` and of x.
    """
    folded = folds(x.shape[0], Q.shape[0], P.shape[1])
    if folded:
        Q = kernels.linear(Q, core.mT)
        if kernels.pair is not None:
            return kernels.pair(x, P, Q, bias)
    t = kernels.linear(x, P)
    return t, kernels.linear(t if folded else kernels.linear(t, core), Q, bias)


# oneDNN compiles each new shape, about 8 a layer, and torch keeps the last 1,024 of them, some 0.6 MiB each (torch
# 2.13): with an r for every number, a process would grow by that at each update.
ONEDNN_MULTIPLE = 8
register_onednn_flops()


def onednn_serves(x: Tensor, A: Tensor, S: Tensor, C: Tensor) -> bool:
    """Whether these are fp32 matrices on a CPU with an r that is a multiple of 8.

    torch uses oneDNN for bf16 only; at ViT-B/16's shapes it multiplies thin fp32 matrices faster than the BLAS behind
    ``torch.mm``, and adds the bias in the same pass: ``benchmarks/results/layer.json``. Switched off by
    ``torch.backends.mkldnn.flags(enabled=False)``.
    """
    return (
        x.device.type == "cpu"
        and all(t.dtype == torch.float32 for t in (x, A, S, C))
        and S.shape[0] % ONEDNN_MULTIPLE == 0
        and onednn_enabled()
    )


def torch_serves(x: Tensor, A: Tensor, S: Tensor, C: Tensor) -> bool:
    """Whether folding saves operations; three products in a row need no kernels of ours."""
    return folds(x.numel() // x.shape[-1], C.shape[0], A.shape[1]) and x.dtype == A.dtype == S.dtype == C.dtype


def fused_serves(x: Tensor, A: Tensor, S: Tensor, C: Tensor) -> bool:
    """Whether Triton is there, and its kernel faster than two products of torch for this shape and dtype.

    Timings differ from run to run, and so would the choice: never under ``torch.use_deterministic_algorithms(True)``. Nor
    where operations are counted: a kernel of ours is none of torch's operations.
    """
    reproducible = torch.are_deterministic_algorithms_enabled()
    if not (TRITON and x.is_cuda and torch_serves(x, A, S, C)) or reproducible or is_watched():
        return False
    return bool(_fused().fused_is_faster(x, A, C))


def _fused() -> Any:
    from hpc_oialr.lowrank.kernels import fused  # imports Triton

    return fused


TORCH = Kernels(torch_serves, F.linear)
ONEDNN = Kernels(onednn_serves, onednn_linear)
FUSED = Kernels(fused_serves, F.linear, pair=lambda x, P, Q, bias: _fused().two_products(x, P, Q, bias))
# The first that serves is used. oneDNN is faster with AVX-512 only: benchmarks/results/layer_avx2.json.
_BY_CPU = (ONEDNN,) if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else ()
KERNELS: tuple[Kernels, ...] = (FUSED, *_BY_CPU, TORCH)


def serving(x: Tensor, A: Tensor, S: Tensor, C: Tensor) -> Kernels | None:
    """The first of :data:`KERNELS` that serves; None where three products of torch in a row are as good."""
    return next((kernels for kernels in KERNELS if kernels.serve(x, A, S, C)), None)
