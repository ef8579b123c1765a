"""How a low-rank layer computes: factored or merged, whichever is cheaper, and by which kernel the factored form.

A further kernel is a differentiable function and its line in :data:`KERNELS`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from hpc_oialr.errors import ConfigError, DataError
from hpc_oialr.system_errors import read_json
from hpc_oialr.torch_compat import is_transformed, onednn_enabled, onednn_linear, register_onednn_flops

log = logging.getLogger(__name__)


def dense_cost(tokens: int, m: int, n: int) -> int:
    """Multiply-adds of a dense layer, forward and backward: ``3 B m n``."""
    return 3 * tokens * m * n


def factored_cost(tokens: int, m: int, n: int, r: int) -> int:
    """Multiply-adds of ``x -> x Vh^T -> S^T -> U^T`` with only S trained: ``2 B r (m + n) + 3 B r^2``."""
    return 2 * tokens * r * (m + n) + 3 * tokens * r * r


def merged_cost(tokens: int, m: int, n: int, r: int) -> int:
    """Multiply-adds when ``W = U S Vh`` is built first and its gradient projected back to S.

    A dense layer, ``S Vh`` and ``U (S Vh)`` forward, the two products of ``U^T dW Vh^T`` backward.
    """
    return dense_cost(tokens, m, n) + 2 * m * n * r + 2 * n * r * r


def prefer_factored(tokens: int, m: int, n: int, r: int, *, crossover: float = 1.0) -> bool:
    """Whether factored execution is faster for this many rows of input (for a convolution: output positions).

    ``crossover`` is the ratio of factored to merged multiply-adds at which both take the same time: 1 by the count
    alone, less where a measurement found the thin products of the factored form less efficient.

    >>> prefer_factored(1024, 768, 768, 192), prefer_factored(1024, 768, 768, 700)
    (True, False)
    """
    # Decided without the tokens where possible: they are a symbol under torch.export and torch.compile, and a
    # comparison would tie the program to this side of the border.
    if factored_cost(1, m, n, r) <= crossover * dense_cost(1, m, n):
        return True
    if torch.compiler.is_exporting():
        return False
    return factored_cost(tokens, m, n, r) <= crossover * merged_cost(tokens, m, n, r)


def crossover_by_dtype(path: str | Path) -> dict[torch.dtype, float]:
    """:func:`measured_crossover` for each dtype a layer may run in; that of float32 where none is measured."""
    found = {torch.float32: measured_crossover(path)}
    # fp16 goes through the same units as bf16, and the benchmark has no rows of its own for it, nor for float64.
    rows_of = {torch.bfloat16: "bfloat16", torch.float16: "bfloat16", torch.float64: "float64"}
    for dtype, name in rows_of.items():
        try:
            found[dtype] = measured_crossover(path, name)
        except ConfigError:
            found[dtype] = found[torch.float32]
            if dtype == torch.bfloat16:
                log.warning(
                    "%s holds no rows of bfloat16: layers that run in bf16 or fp16 are factored or merged by its "
                    "float32 rows. Run python -m benchmarks.layer with both dtypes.",
                    path,
                )
    return found


def measured_crossover(path: str | Path, dtype: str = "float32") -> float:
    """The crossover from rows of ``dtype`` in a result file of ``python -m benchmarks.layer --out FILE``; at most 1.

    The logarithm of factored time over merged time is fitted as linear in the ratio of their multiply-adds.
    """
    fix = "Run python -m benchmarks.layer."
    try:
        rows = [row for row in read_json(Path(path))["rows"] if row["dtype"] == dtype]
    except (DataError, TypeError, KeyError) as error:
        rule = f"must be a number, or the result file of that benchmark ({error})"
        raise ConfigError("crossover", str(path), rule, fix=fix) from None
    if not rows:
        raise ConfigError("crossover", str(path), f"must hold rows of dtype {dtype}", fix=fix)
    costs = [(row["tokens"], row["m"], row["n"], row["r"]) for row in rows]
    flops = np.array([factored_cost(*c) / merged_cost(*c) for c in costs])
    slower = np.log([row["time_ratio"] / row["rebuild_ratio"] for row in rows])
    slope, offset = np.polyfit(flops, slower, 1)
    return float(np.clip(-offset / slope, 0.0, 1.0)) if slope > 0 else 1.0


def factored_linear(x: Tensor, A: Tensor, S: Tensor, C: Tensor, bias: Tensor | None) -> Tensor:
    """``y = ((x A^T) S^T) C^T + bias`` by the first of :data:`KERNELS` that fits, else by torch's own products.

    x is (..., n), A is r x n, S is r x r, C is m x r, y is (..., m). Derivatives of any order are right on every path.
    """
    if not is_transformed():
        for fits, kernel in KERNELS:
            if fits(x, A, S, C):
                return kernel(x, A, S, C, bias)
    return F.linear(F.linear(F.linear(x, A), S), C, bias)


# oneDNN compiles each new shape, about 8 a layer, and torch keeps the last 1,024 of them, some 0.6 MiB each (torch
# 2.13): with an r for every number, a process would grow by that at each update.
ONEDNN_MULTIPLE = 8
register_onednn_flops()


def onednn_fits(x: Tensor, A: Tensor, S: Tensor, C: Tensor) -> bool:
    """Whether these are fp32 matrices on a CPU, frozen but for S, with an r that is a multiple of 8.

    torch uses oneDNN for bf16 only; at ViT-B/16's shapes it multiplies thin fp32 matrices faster than the BLAS behind
    ``torch.mm``, and adds the bias in the same pass: ``benchmarks/results/layer.json``. Switched off by
    ``torch.backends.mkldnn.flags(enabled=False)``.
    """
    return (
        x.device.type == "cpu"
        and all(type(t) in (Tensor, torch.nn.Parameter) and t.dtype == torch.float32 for t in (x, A, S, C))
        and x.layout is torch.strided
        and not x.is_nested
        and not (A.requires_grad or C.requires_grad)
        and x.numel() > 0
        and x.shape[-1] == A.shape[1]  # otherwise torch's error is the clearer one
        and S.shape[0] % ONEDNN_MULTIPLE == 0
        and onednn_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def onednn_kernel(x: Tensor, A: Tensor, S: Tensor, C: Tensor, bias: Tensor | None) -> Tensor:
    """The products by oneDNN."""
    y: Tensor = _OneDNN.apply(x.reshape(-1, x.shape[-1]), A, S, C, bias)[0]  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], C.shape[0])


class _OneDNN(torch.autograd.Function):
    """``y``, and ``a = x A^T`` (B x r), which is kept for the gradient of S in place of x.

    ``a`` is an output so that a second derivative finds its way from it back to x.
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


# Whether a kernel serves x, A, S, C; and the kernel, which takes the bias too. Not called while is_transformed().
KERNELS: tuple[tuple[Callable[..., bool], Callable[..., Tensor]], ...] = ((onednn_fits, onednn_kernel),)
