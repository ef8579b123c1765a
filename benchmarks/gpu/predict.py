"""What a layer should take on a GPU, before it is measured: writes `benchmarks/results/gpu_notes.md` to stdout.

Each product or fused kernel takes the longer of its operations at the rate of large products and its bytes at two thirds
of the speed of copies, both measured on one H200 (torch 2.11, bf16, commit 64dc837).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

FLOPS_PER_S, BYTES_PER_S = 780e12, 4.3e12 * 2 / 3
TOKENS = 50_432
SHAPES = ((768, 768), (3072, 768), (2048, 2048))
# Measured then: time over dense of the folded core by torch's products, at k/2, k/4 and k/8.
FOLDED_THEN = {
    (768, 768): (1.18, 1.14, 1.02),
    (3072, 768): (0.59, 0.36, 0.30),
    (2048, 2048): (0.91, 0.46, 0.26),
}
HEAD = """# Notes on the GPU's speed: prediction first, outcome beside it

Written by `python -m benchmarks.gpu.predict`. One linear layer, forward and backward, bf16, {tokens:,} tokens, time over
dense. Launches: dense 3, three products 7, folded 5 (and 2 small ones that fold), fused 3 (and the same 2).

| layer | r | operations | predicted, folded | measured, folded (64dc837) | predicted, fused | measured, fused |
| --- | --- | --- | --- | --- | --- | --- |"""
TAIL = """
What the prediction says: five separate products would come close to the fused kernels if cuBLAS ran thin shapes at the
memory's speed. The measured ones are up to twice the prediction, so the kernels must win by their tiles, not by fewer
bytes. A 768 x 768 layer is bound by its own input and output: even r = 1 would take {limit:.2f} of dense.

Muon's step on 64 cores, r from 129 to 192, and one 768 x 768 weight: 1,261 launches with a batch for each shape, 191 with
cores padded to 192 in one batch, of which 127 copy cores into it and out of it (counted in `tests/optim/test_muon.py`).
Predicted in eager mode, at 5 us a launch: 6.3 and 1.0 ms. Not measured yet.

Update and conversion of ViT-B/16's 73 layers by `gram_svd`, with 16 host cores (one takes 2.8 and 16 ms for the
eigenvectors of a 192 x 192 and a 384 x 384 matrix): at k/4 13 ms for eigenvectors on the host and 90 ms for Python
(process time of an update of 73 layers of 32 x 32 on a CPU, which computes hardly anything), .11 s together, .54 before;
at k/2 73 and 90 ms, 1.04 s before. Conversion: 73 x 7.8 ms for eigenvectors on the GPU, 90 ms for Python and 40 ms for
products in float64, .7 s together, 2.7 s before. Not measured yet; sections update and svd do.

Not measured yet: no GPU has run the fused kernels. `python -m benchmarks.gpu` has a variant for each column."""


def seconds(operations: float, numbers: float) -> float:
    """Of one kernel in bf16."""
    return max(2 * operations / FLOPS_PER_S, 2 * numbers / BYTES_PER_S)


def product(a: int, b: int, c: int) -> float:
    """(a x b) (b x c) by one call."""
    return seconds(a * b * c, a * b + b * c + a * c)


def fused(tokens: int, K: int, N: int, r: int) -> float:
    """``t = x P^T`` and ``y = t Q^T`` in one kernel."""
    return seconds(tokens * r * (K + N), tokens * (K + N + r) + r * (K + N))


def ratios(m: int, n: int, r: int, tokens: int = TOKENS) -> tuple[float, float, float]:
    """Operations, and time over dense of the folded core by five products and by two fused kernels and one product."""
    dense = product(tokens, n, m) + product(tokens, m, n) + product(m, tokens, n)
    core = product(r, tokens, r)
    five = sum(product(tokens, a, b) for a, b in ((n, r), (r, m), (m, r), (r, n))) + core
    operations = (2 * tokens * r * (m + n) + tokens * r * r) / (3 * tokens * m * n)
    return operations, five / dense, (fused(tokens, n, m, r) + fused(tokens, m, n, r) + core) / dense


def lines() -> Sequence[str]:
    """The notes."""
    rows = []
    for m, n in SHAPES:
        for part, then in zip((2, 4, 8), FOLDED_THEN[m, n], strict=True):
            operations, folded, both = ratios(m, n, min(m, n) // part)
            rows.append(f"| {m} x {n} | k/{part} | {operations:.2f} | {folded:.2f} | {then:.2f} | {both:.2f} | - |")
    limit = ratios(768, 768, 1)[2]
    return [HEAD.format(tokens=TOKENS), *rows, TAIL.format(limit=limit)]


if __name__ == "__main__":
    sys.stdout.write("\n".join(lines()) + "\n")
