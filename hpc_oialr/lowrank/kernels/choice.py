"""Fused kernel or two products of torch: measured once for each kind of shape, on the GPU at hand."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from hpc_oialr.lowrank.kernels.fused import MAX_R, two_products

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A batch of this many rows fills any GPU; more take as much longer on both sides.
ROWS = 16_384


def fused_is_faster(x: Tensor, A: Tensor, C: Tensor) -> bool:
    """Whether :func:`two_products` is faster than torch in this layer's forward pass."""
    r, n = A.shape
    if x.dtype not in DTYPES or r > MAX_R:
        return False
    # Powers of two: the kernel's tiles are, and r changes at every update.
    rows = min(ROWS, triton.next_power_of_2(x.numel() // n))
    key = (x.device, x.dtype, rows, C.shape[0], n, max(16, triton.next_power_of_2(r)))
    if torch.cuda.is_current_stream_capturing():
        return _measured.get(key, False)
    if key not in _measured:
        _measured[key] = _is_faster(*key)
    return _measured[key]


_measured: dict[tuple[torch.device, torch.dtype, int, int, int, int], bool] = {}


def _is_faster(device: torch.device, dtype: torch.dtype, rows: int, m: int, n: int, r: int) -> bool:
    x, P, Q = (torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, n), (r, n), (m, r)))
    time_ms = functools.partial(triton.testing.do_bench, warmup=5, rep=20, return_mode="median")
    fused = time_ms(lambda: two_products(x, P, Q, None))
    return bool(fused < time_ms(lambda: torch.nn.functional.linear(torch.nn.functional.linear(x, P), Q)))
