"""The fused kernels in Triton's interpreter: prints the largest error against float64 for each dtype, and training runs.

Run with TRITON_INTERPRET=1, which Triton reads when a kernel is defined.
"""

from __future__ import annotations

import json
import os
import random
import sys

import torch
from support.execution_paths import PATHS, losses_and_r
from torch import Tensor

from hpc_oialr.lowrank.kernels.fused import MAX_R
from hpc_oialr.lowrank.products import FUSED, FactoredFunction


def operands(case: int, draw: random.Random) -> list[Tensor | None]:
    """x, A, S, C and bias in float64: odd sizes, strided and transposed ones, r = 1, the largest r, an empty batch."""
    m, n = draw.randint(1, 80), draw.randint(1, 80)
    r = {0: MAX_R, 1: 1}.get(case, draw.randint(1, 80))
    tokens = 0 if case == 2 else (m + n) // 2 + draw.randint(1, 80)
    generator = torch.Generator().manual_seed(case)
    wide = torch.randn(tokens, 2 * n, generator=generator, dtype=torch.float64)
    x = wide[:, ::2] if case % 3 == 0 else wide[:, :n]
    A, C = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((r, n), (m, r)))
    if case % 2:
        A, C = A.mT.contiguous().mT, C.mT.contiguous().mT
    S = torch.randn(r, r, generator=generator, dtype=torch.float64)
    bias = torch.randn(m, generator=generator, dtype=torch.float64) if case % 5 else None
    return [x, A / n**0.5, S / r**0.5, C / r**0.5, bias]


def results(given: list[Tensor | None], dy: Tensor, dtype: torch.dtype, *, fused: bool) -> list[Tensor]:
    """The layer's output and every gradient, by the fused kernels or in float64."""
    leaves = [None if t is None else t.to(dtype).detach().requires_grad_() for t in given]
    x, A, S, C, bias = leaves
    assert x is not None
    if fused:
        y = FactoredFunction.apply(x, A, S, C, bias, FUSED)[0]
    else:
        y = torch.nn.functional.linear(x @ A.mT @ S.mT, C, bias)
    grads = torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(dtype))
    return [t.detach().double() for t in (y, *grads)]


def sizes(given: list[Tensor], dy: Tensor, exact: list[Tensor]) -> list[float]:
    """What errors are relative to: the norm, but of sums over the batch that cancel the root of their squared terms."""
    x, A, S, C, *_ = given
    a, db = x @ A.mT, dy @ C
    factors = {2: (db @ S, x), 3: (db, a), 4: (dy, a @ S.mT)}
    terms = {i: float((left.square().mT @ right.square()).sum().sqrt()) for i, (left, right) in factors.items()}
    return [max(float(t.norm()), terms.get(i, 0.0), 1e-30) for i, t in enumerate(exact)]


def largest_errors(cases: int) -> dict[str, float]:
    """Relative to exact results, on many shapes."""
    draw, worst = random.Random(0), dict.fromkeys(("float32", "bfloat16", "float16"), 0.0)
    for case in range(cases):
        given = operands(case, draw)
        shape = given[0].shape[0], given[3].shape[0]
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for name in worst:
            dtype = getattr(torch, name)
            *rounded, dy = (None if t is None else t.to(dtype).double() for t in (*given, gradient))
            fused = results(rounded, dy, dtype, fused=True)
            exact = results(rounded, dy, torch.float64, fused=False)
            for a, b, size in zip(fused, exact, sizes(rounded, dy, exact), strict=True):
                assert a.shape == b.shape, (case, a.shape, b.shape)
                worst[name] = max(worst[name], float((a - b).norm()) / size)
    return worst


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    runs = {name: losses_and_r(*path) for name, path in PATHS.items()}
    sys.stdout.write(json.dumps({"errors": largest_errors(int(sys.argv[1])), "runs": runs}))
