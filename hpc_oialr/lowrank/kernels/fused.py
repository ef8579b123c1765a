"""Two thin products in one kernel, ``t = x P^T`` and ``y = t Q^T + bias``, and whether it is used.

Forward pass of a layer: P = Vh, Q = U S. Backward pass: x = dy, P = U^T, Q = (S Vh)^T, so that t and y are the gradients
of ``U^T y`` and of the layer's input. The r-wide tile stays on the chip, so x is read once, t and y are written once: B
(m + n + r) numbers of traffic each way, where two calls of cuBLAS move B (m + n + 2 r). On an H100 cuBLAS 13.0 was faster
at every shape tried all the same (``benchmarks/results/gpu_notes.md``); on other GPUs each kind of shape is measured
before the kernel is used.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

# Of fp32 the tiles do not fit into shared memory.
DTYPES = (torch.bfloat16, torch.float16)
# The accumulator of one program is BLOCK_B x r in registers.
MAX_R = 512
# Above, the kernel took five times as long as two products of cuBLAS: the r-wide tile leaves no registers to hide loads.
WORTH_TRYING = 256
# From this capability on cuBLAS was faster at every shape tried, by 1.2 times and more (Hopper, measured on an H100).
SLOWER = (9, 0)
# A batch of this many rows fills any GPU, and its input no L2 cache holds.
TRIAL_ROWS = 65_536
# Triton's interpreter, which runs these kernels on a CPU, keeps bf16 as its bits and multiplies those: WIDEN there.
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, PRECISION)


@triton.jit
def _two_products(
    x, P, Q, bias, t, y, B, R,
    x_row, x_col, P_row, P_col, Q_row, Q_col,
    K: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # 64-bit: B N passes 2^31 in large batches.
    rows = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
    inner = tl.arange(0, BLOCK_R)
    tile = tl.zeros((BLOCK_B, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        place = x + rows * x_row + columns[None, :].to(tl.int64) * x_col
        part = tl.load(place, (rows < B) & (columns[None, :] < K), 0.0)
        where = P + columns[:, None] * P_col + inner[None, :] * P_row
        other = tl.load(where, (columns[:, None] < K) & (inner[None, :] < R), 0.0)
        tile = _dot(part, other, tile, PRECISION, WIDEN)
    tile = tile.to(t.dtype.element_ty)
    tl.store(t + rows * R + inner[None, :], tile, (rows < B) & (inner[None, :] < R))
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        where = Q + inner[:, None] * Q_col + columns[None, :] * Q_row
        part = tl.load(where, (inner[:, None] < R) & (columns[None, :] < N), 0.0)
        out = _dot(tile, part, tl.zeros((BLOCK_B, BLOCK_N), tl.float32), PRECISION, WIDEN)
        if HAS_BIAS:
            out += tl.load(bias + columns, columns < N, 0.0).to(tl.float32)[None, :]
        tl.store(y + rows * N + columns[None, :], out.to(y.dtype.element_ty), (rows < B) & (columns[None, :] < N))


class Tiles(NamedTuple):
    """Block sizes and launch settings of :func:`two_products`, the fastest of seven tried on an H100."""

    BLOCK_B: int
    BLOCK_K: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


def tiles(r: int) -> Tiles:
    """For an r-wide tile that is padded to the next power of two; INTERPRETED: small, there a block is a Python step."""
    if INTERPRETED:
        return Tiles(32, 32, 32, 4, 1)
    if r <= 128:
        return Tiles(128, 64, 128, 8, 3)
    return Tiles(128, 64, 64, 8, 3) if r <= 256 else Tiles(64, 64, 64, 4, 3)


# In a graph: the launches of two products take longer than their difference to one kernel.
_time = functools.partial(triton.testing.do_bench_cudagraph, rep=20, return_mode="median")


def _numerics(x: Tensor) -> dict[str, Any]:
    # Not allow_tf32: torch refuses to read that where only the newer setting was made.
    tf32 = x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"PRECISION": "tf32" if tf32 else "ieee", "WIDEN": INTERPRETED and x.dtype == torch.bfloat16}


def two_products(x: Tensor, P: Tensor, Q: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """``t = x P^T`` (B x r) and ``y = t Q^T + bias`` (B x N); x is B x K, P is r x K, Q is N x r, of any strides.

    Sums are taken in fp32; fp32 inputs are multiplied in TF32 where torch's own products are.
    """
    (B, K), (N, R) = x.shape, Q.shape
    t, y = x.new_empty(B, R), x.new_empty(B, N)
    if B:
        with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
            size = tiles(R)
            _two_products[(triton.cdiv(B, size.BLOCK_B),)](
                x, P, Q, x if bias is None else bias.contiguous(), t, y, B, R, *x.stride(), *P.stride(), *Q.stride(),
                K, N, HAS_BIAS=bias is not None, **_numerics(x), BLOCK_R=max(16, triton.next_power_of_2(R)),
                **size._asdict(),
            )  # fmt: skip
    return t, y


def fused_is_faster(x: Tensor, A: Tensor, C: Tensor) -> bool:
    """Whether :func:`two_products` is faster than torch in this layer's forward pass, measured once a kind of shape."""
    r, n = A.shape
    if x.dtype not in DTYPES or r > WORTH_TRYING or torch.cuda.get_device_capability(x.device) >= SLOWER:
        return False
    # Powers of two: the kernel's tiles are, and r changes at every update.
    rows = min(TRIAL_ROWS, triton.next_power_of_2(x.numel() // n))
    key = (x.device, x.dtype, rows, C.shape[0], n, max(16, triton.next_power_of_2(r)))
    if key not in _measured:
        if torch.cuda.is_current_stream_capturing():
            return False
        _measured[key] = _is_faster(*key)
    return _measured[key]


_measured: dict[tuple[torch.device, torch.dtype, int, int, int, int], bool] = {}


def _is_faster(device: torch.device, dtype: torch.dtype, rows: int, m: int, n: int, r: int) -> bool:
    # A generator of its own: dropout draws the same numbers whether or not something was measured.
    generator, shapes = torch.Generator(device), ((rows, n), (r, n), (m, r))
    try:
        with torch.cuda.device(device):
            x, P, Q = (torch.randn(s, generator=generator, device=device, dtype=dtype) for s in shapes)
            fused = _time(lambda: two_products(x, P, Q, None))
            return bool(fused < _time(lambda: F.linear(F.linear(x, P), Q)))
    except Exception as error:  # no compiler on this node, too little shared memory on this GPU, ...
        log.warning("the fused kernels of low-rank layers do not run here, torch's products are used: %s", error)
        return False
